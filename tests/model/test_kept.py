"""What no cast narrows: norms, mHC, sinks, slot biases and the routers' biases, and ids in whole numbers."""

import re

import pytest
import torch
from torch.nn.utils import parametrize, prune

from abyssal.model import ModelConfig, Transformer
from abyssal.model.kept import kept
from abyssal.model.lineage import LineageConfig, LineageTransformer

KEPT = re.compile(r"(norm(\.weight|\.bias)?|\.(fn|base|scale|attn_sink|ape|tid2eid|canonical)|gate\.bias)$")
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}
SIZES |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8}
SIZES |= {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4}
SIZES |= {
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}
CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to with a device": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.bfloat16),
    "each module": lambda m: [module.bfloat16() for module in m.modules()],
    "in another module": lambda m: torch.nn.Sequential(m).bfloat16(),
    "loading": lambda m: m.load_state_dict(
        {k: v.bfloat16() if v.is_floating_point() else v for k, v in m.state_dict().items()}, assign=True
    ),
}


def v4() -> Transformer:
    return Transformer(ModelConfig.load("nano"))


def lineage() -> LineageTransformer:
    return LineageTransformer(LineageConfig.from_dict({"model_type": "deepseek_v32", **SIZES}))


@pytest.fixture(params=[v4, lineage], ids=["v4", "v3.2"])
def model(request):
    torch.manual_seed(0)
    model = request.param()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name in kept(model):
                tensor.add_(torch.randn_like(tensor))
    return model


def test_the_list(model):
    assert kept(model) == {name for name in model.state_dict() if KEPT.search(name)}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_spare_it(model, cast):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.arange(20)[None], targets=torch.arange(20)[None]).loss.backward()
    cast(model)
    loaded = cast is CASTS["loading"]  # whose values were rounded before they came
    for name, tensor in model.state_dict().items():
        if name in kept(model):
            assert tensor.dtype == before[name].dtype, name
            assert loaded or torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype in (torch.bfloat16, torch.float16), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    assert model(torch.arange(20)[None]).logits.isfinite().all()


def test_casts_spare_it_also_where_torch_hides_it(model):
    parametrize.register_parametrization(model.layers[0].attn_norm, "weight", torch.nn.Identity())
    prune.identity(model.layers[1].attn_norm, "weight")
    before = [model.layers[i].attn_norm.weight.detach().clone() for i in range(2)]
    model.bfloat16()
    assert all(torch.equal(model.layers[i].attn_norm.weight, before[i]) for i in range(2))
    assert model.layers[1].attn_norm.weight_orig.dtype == torch.float32


def test_whatever_the_default_is(model):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        built = type(model)(model.config).state_dict()
    finally:
        torch.set_default_dtype(before)
    assert all(built[name].dtype in (torch.float32, torch.int64) for name in kept(model))


def test_float64_and_back(model):
    model.double()
    assert {x.dtype for x in model.state_dict().values() if x.is_floating_point()} == {torch.float64}
    model.bfloat16()
    assert all(model.state_dict()[name].dtype in (torch.float32, torch.int64) for name in kept(model))


def test_balancing_goes_on_in_bfloat16(model):
    """100 updates of 0.001 move a bias of 0.75 by 0.1; in bfloat16 its neighbours are 0.004 apart."""
    model.bfloat16()
    gate = model.layers[-1].ffn.gate
    gate.bias.fill_(0.75)
    for _ in range(100):
        gate.counts = torch.arange(len(gate.bias), dtype=torch.float32)
        model.update_router_bias(1e-3)
    half = len(gate.bias) // 2
    want = torch.tensor([0.85] * half + [0.65] * half)
    assert torch.allclose(gate.bias, want, atol=1e-5)
