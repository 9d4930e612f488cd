"""MTP against an independent computation: the way in and out by hand in float64, the block by transformers' decoder
layer.
"""

import pytest
import torch
from oracle import assert_same

pytest.importorskip("transformers")

from peer import make_peer, peer_config

from abyssal.model import ModelConfig, Transformer
from abyssal.model.interchange.names import sources

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "moe_intermediate_size": 24, "head_dim": 24, "qk_rope_head_dim": 8,
    "q_lora_rank": 20, "o_lora_rank": 12, "num_experts_per_tok": 3, "n_routed_experts": 8, "sliding_window": 16,
    "index_topk": 6,
}  # fmt: skip


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.fixture(scope="module")
def models():
    peer = make_peer(peer_config(layers=(0,), num_hash_layers=0, **SHAPE)).double()
    peer.set_experts_implementation("eager")  # grouped_mm has no float64
    keys = {key: value for key, value in peer.config.to_dict().items() if value is not None}
    config = ModelConfig.from_dict({**keys, "num_nextn_predict_layers": 1})
    torch.manual_seed(1)
    ours = Transformer(config).double().eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn_like(p))
    block = {n.removeprefix("mtp.0."): x for n, x in ours.state_dict().items() if n.startswith("mtp.0.")}
    own = ("enorm", "hnorm", "norm.", "e_proj", "h_proj", "hc_head")
    as_layer = {f"layers.0.{n}": x for n, x in block.items() if not n.startswith(own)}
    state = {
        there: tensor[index]
        for name, tensor in as_layer.items()
        for there, index in sources(name, config, "huggingface").items()
    }
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and not [n for n in missing if ".layers.0." in n]
    return peer, ours


def test_mtp_logits_and_loss(models):
    peer, ours = models
    ids = torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(1))
    targets[0, 5:9] = -100
    streams = {}
    hook = ours.hc_head.register_forward_hook(lambda _, inputs, __: streams.update(x=inputs[0]))
    loss = ours(ids, targets=targets).losses["mtp"]
    hook.remove()

    mtp, x = ours.mtp[0], streams["x"][:, :-1]
    entering = rms(ours.embed(ids[:, 1:]), mtp.enorm.weight) @ mtp.e_proj.weight.T
    entering = entering[:, :, None] + rms(x, mtp.hnorm.weight) @ mtp.h_proj.weight.T
    positions = torch.arange(44)[None]
    rotary = peer.model.rotary_emb(entering, position_ids=positions, layer_type="main")
    distance = torch.arange(44)[:, None] - torch.arange(44)
    hidden = torch.zeros(44, 44, dtype=torch.float64).masked_fill((distance < 0) | (distance >= 16), -torch.inf)
    left = peer.model.layers[0](
        entering, position_embeddings={"main": rotary}, position_ids=positions, attention_mask=hidden[None, None],
        input_ids=ids[:, 1:], past_key_values=None,
    )  # fmt: skip
    flat = left.flatten(2)
    head = mtp.hc_head
    weights = torch.sigmoid(rms(flat, 1.0) @ head.fn.T * head.scale + head.base) + 1e-6
    logits = rms((weights[..., None] * left).sum(2), mtp.norm.weight) @ ours.head.weight.T
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
    assert_same("mtp loss", loss, want, 1e-6)
