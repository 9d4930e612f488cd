"""One layer of each kind at the released widths, on a CPU: forward and backward, with four experts.

In bfloat16 where the processor multiplies it. Elsewhere its products take fifty times as long as those of float32,
which then stands in.
"""

import math
from dataclasses import replace

import pytest
import torch

from abyssal.model import ModelConfig, Transformer
from abyssal.model.lineage import LineageConfig, LineageTransformer

TOKENS = 140  # one HCA entry, and more than a window

NATIVE = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
DTYPE = torch.bfloat16 if NATIVE else torch.float32
KINDS = {"sliding": 0, "sparse": 4, "heavy": 128}


@pytest.fixture(autouse=True)
def repeated_numbers(monkeypatch):
    """Weights are a million random numbers over and over: half a billion of their own would take most of the time."""
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def fill(tensor, mean=0.0, std=1.0):
        spread = numbers * std + mean
        for part in tensor.data.view(-1).split(len(numbers) - 7):  # rows are not to be alike
            part.copy_(spread[: len(part)])

    monkeypatch.setattr(torch.nn.init, "normal_", fill)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)


FLASH, PRO = "v4-flash", "v4-pro"  # which has no sliding layer


@pytest.mark.slow("up to a billion weights")
@pytest.mark.parametrize(("name", "kind"), [*((FLASH, kind) for kind in KINDS), (PRO, "sparse"), (PRO, "heavy")])
def test_a_layer_of_v4(name, kind):
    released = ModelConfig.load(name)
    few = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "num_hash_layers": 0, "n_routed_experts": 4}
    few["num_experts_per_tok"] = 2
    own = {"compress_ratios": (KINDS[kind],), "layer_types": (), "vocab_size": 512}
    config = replace(released, **few, **own, index_topk=8)
    torch.manual_seed(0)
    model = Transformer(config).to(DTYPE)
    width = model.layers[0].attn.wq_b.weight.shape
    assert width == (released.num_attention_heads * 512, released.q_lora_rank)
    learns(model, 512)
    assert model.layers[0].attn.kind == config.layer_types[0]


@pytest.mark.parametrize("name", ["v3", "v3.2"])
def test_a_layer_of_the_lineage(name):
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = replace(LineageConfig.load(name), **few, n_group=2, topk_group=1, vocab_size=512)
    torch.manual_seed(0)
    learns(LineageTransformer(config).to(DTYPE), 512, tokens=40)


def learns(model, vocabulary, tokens=TOKENS):
    """A step whose loss is that of an untrained model, with a finite gradient that is not zero for every weight."""
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(1))
    out = model(ids, targets=ids.roll(-1, 1))
    spread = model.config.initializer_range**2 * model.config.hidden_size  # of the logits, which a wide head has
    assert abs(float(out.losses["lm"].detach()) - math.log(vocabulary) - spread / 2) < 0.5
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and 0 < float(torch.linalg.vector_norm(parameter.grad)) < math.inf, name
