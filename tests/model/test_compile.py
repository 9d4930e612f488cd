"""torch.compile(model): the same logits, losses and gradients, in one graph where no cache is involved."""

import pytest
import torch
from lively import draw_ids
from torch.testing import assert_close

from abyssal.model import ModelConfig, Transformer
from abyssal.model.lineage import LineageConfig, LineageTransformer

V3 = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4}
V3 |= {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8}
V3 |= {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}


@pytest.fixture(autouse=True)
def afresh():
    """What other tests have compiled counts towards dynamo's limit."""
    torch._dynamo.reset()


def nano(layers: int = 3, **changes) -> Transformer:
    """Without changes all kinds of layers, both routers, Engram and MTP."""
    values = ModelConfig.load("nano").to_dict()
    ratios, kinds = values["compress_ratios"], values.get("layer_types")
    changes |= {"num_hidden_layers": layers, "compress_ratios": ratios[:layers]}
    changes |= {"layer_types": kinds[:layers]} if kinds else {}
    return Transformer(ModelConfig.from_dict({**values, **changes}))


MODELS = {
    "v4": nano,
    "v3": lambda: LineageTransformer(LineageConfig.from_dict({"model_type": "deepseek_v3", **V3})),
    "v3.2": lambda: LineageTransformer(LineageConfig.from_dict({"model_type": "deepseek_v32", **V3, **INDEXER})),
}


def outcome(model, run, **given):
    """Logits, losses and gradients of a pass."""
    model.zero_grad()
    out = run(**given)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **{k: v.detach() for k, v in out.losses.items()}, **gradients}


@pytest.mark.slow("the whole model is traced, forward and backward, for three kinds of models")
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_computes_the_same(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for t in (19,) if name == "v4" else (19, 33):  # another length is compiled anew
        ids = draw_ids(2, t, top=50)
        given = {
            "ids": ids,
            "targets": ids.roll(-1, 1),
            "documents": torch.tensor([[0] * 7 + [-1] * 3 + [1] * (t - 10)] * 2),
        }
        assert_close(outcome(model, compiled, **given), outcome(model, model, **given), rtol=1e-5, atol=1e-7)


@pytest.mark.slow("C++ is compiled")
def test_the_default_compiler():
    """Inductor, of a single sliding layer without Engram."""
    torch.manual_seed(0)
    model = nano(1, engram=None, num_nextn_predict_layers=0)
    ids = draw_ids(2, 19, top=250)
    compiled = torch.compile(model, fullgraph=True)
    assert_close(
        outcome(model, compiled, ids=ids, targets=ids),
        outcome(model, model, ids=ids, targets=ids),
        rtol=1e-4,
        atol=1e-6,
    )


@torch.no_grad()
def test_other_classes_of_tokens_are_seen():
    """What stands before a document is a number in compiled code; a model that is loaded has another."""
    torch.manual_seed(0)
    memory = {**ModelConfig.load("nano").to_dict()["engram"], "layers": [0]}
    model, ids = nano(1, engram=memory, num_nextn_predict_layers=0).eval(), draw_ids(1, 12, top=250)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(ids).logits, model(ids).logits)
    state = {name: x.flip(0) if name.endswith("canonical") else x for name, x in model.state_dict().items()}
    before = model(ids).logits
    model.load_state_dict(state)
    assert_close(compiled(ids).logits, model(ids).logits)
    assert (model(ids).logits - before).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_may_be_given():
    """Its bookkeeping is Python's: the graph breaks there."""
    torch.manual_seed(0)
    model, ids = nano(1, engram=None).eval(), draw_ids(1, 12, top=250)
    compiled, cache = torch.compile(model, backend="aot_eager"), model.new_cache(1, 12)
    got = torch.cat([compiled(part, cache=cache).logits for part in ids.split([10, 1, 1], 1)], 1)
    assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-5)
