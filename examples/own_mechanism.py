"""A mechanism of one's own, without a fork: LayerNorm, which centres, in the place of RMSNorm before each sublayer.

    abyssal train nano --set train.prepare=examples/own_mechanism.py:layer_norm

The function gets the model as soon as it is built, before weights are loaded and the optimizer is made. What it puts
in is trained, saved and resumed; decoding notices that a module is not ours and computes with yours. Who opens such a
run is asked to allow its code (--trust-code).
"""

from torch import nn

from abyssal.model import Transformer


def layer_norm(model: Transformer) -> None:
    for block in (*model.layers, *model.mtp):
        for site in ("attn_norm", "ffn_norm"):
            old = getattr(block, site)
            setattr(block, site, nn.LayerNorm(old.weight.numel(), old.eps, device=old.weight.device))
