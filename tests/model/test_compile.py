"""torch.compile(model): the same logits, losses and gradients, in one graph where no cache is involved."""

from contextlib import suppress

import pytest
import torch
from lively import draw_ids
from torch.testing import assert_close

from abyssal.model import ModelConfig, Transformer
from abyssal.model.lineage import LineageConfig, LineageTransformer

# what decodes in numpy, in step.py, may remember what it likes: dynamo goes around it
REMEMBERED = r"Dynamo detected a call to a .functools\.lru_cache.-wrapped function at .(?!step\.py)"
pytestmark = pytest.mark.filterwarnings(f"error:{REMEMBERED}")
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


def lineage(kind: str, **values) -> LineageTransformer:
    return LineageTransformer(LineageConfig.from_dict({"model_type": kind, **values}))


MODELS = {
    "v4": nano,
    "v3": lambda **changes: lineage("deepseek_v3", **V3, **changes),
    "v3.2": lambda **changes: lineage("deepseek_v32", **V3, **INDEXER, **changes),
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
    model.layers[0].engram.canonical = torch.arange(260).roll(7)
    assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", MODELS)
def test_a_try_to_export_leaves_nothing_behind(name):
    """Whether it succeeds is torch's to say; models of the same configuration run afterwards."""
    memory = {**ModelConfig.load("nano").to_dict()["engram"], "layers": [0], "seed": 7}
    changes = {"engram": memory, "num_nextn_predict_layers": 0, "layers": 1} if name == "v4" else {}
    model, ids = MODELS[name](**changes, rope_theta=10007.0).eval(), draw_ids(1, 19, top=50)  # seen by no other test
    with suppress(Exception):
        torch.export.export(model, (ids,), strict=False)
    assert model(ids).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_may_be_given():
    """Its bookkeeping is Python's: the graph breaks there."""
    torch.manual_seed(0)
    model, ids = nano(1, engram=None).eval(), draw_ids(1, 12, top=250)
    compiled, cache = torch.compile(model, backend="aot_eager"), model.new_cache(1, 12)
    got = torch.cat([compiled(part, cache=cache).logits for part in ids.split([10, 1, 1], 1)], 1)
    assert_close(got, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_documents_are_looked_at(backend):
    yarn = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8}
    sizes = {"engram": None, "num_nextn_predict_layers": 0, "max_position_embeddings": 16, "rope_scaling": yarn}
    compiled, ids = torch.compile(nano(1, **sizes), backend=backend, fullgraph=True), draw_ids(1, 24, top=250)
    pieces = {"one piece": [0] * 8 + [1] * 8 + [0] * 8, "ids >= 0": [0] * 12 + [-5] * 12, "=16": [0] * 20 + [1] * 4}
    for says, documents in pieces.items():
        with pytest.raises(RuntimeError, match=says):
            compiled(ids, targets=ids, documents=torch.tensor([documents]))
    compiled(ids, targets=ids, documents=torch.tensor([[0] * 12 + [1] * 12])).loss.backward()


def test_recompute_breaks_the_graph():
    torch.manual_seed(0)
    model, ids = nano(1, engram=None, num_nextn_predict_layers=0), draw_ids(2, 19, top=250)
    model.recompute = 1
    with pytest.raises(Exception, match="recompute: one graph cannot work layers out again"):
        torch.compile(model, backend="eager", fullgraph=True)(ids, targets=ids)
    got = outcome(model, torch.compile(model, backend="aot_eager"), ids=ids, targets=ids)
    assert_close(got, outcome(model, model, ids=ids, targets=ids), rtol=1e-5, atol=1e-7)
