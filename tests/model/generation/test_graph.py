"""Tokens by a CUDA graph, played on a CPU: the tape repeats what was captured, in the same places (`tape`)."""

import importlib

import pytest
import tape
import torch
from lively import draw_ids, lively

from abyssal.kernels import backend
from abyssal.model import generate
from abyssal.model.generation import graph as graph_module
from abyssal.model.generation.graph import TokenGraph
from abyssal.model.generation.prefill import prefill
from abyssal.model.lineage import LineageConfig, LineageTransformer

generate_module = importlib.import_module("abyssal.model.generation.generate")
experts_reference = importlib.import_module("abyssal.kernels.moe_experts.reference")


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    """Definitions alone, which read nothing on the host, and torch's graphs replaced."""

    def experts(x, experts, weights, w13, w2, *, limit, shared=None):
        out = torch.zeros_like(x) if shared is None else shared
        for e in range(len(w13)):  # of every token: the definition looks on the host who comes
            share = (weights * (experts == e)).sum(1)
            out = out + experts_reference.swiglu(x @ w13[e].mT, limit, share) @ w2[e].mT
        return out

    monkeypatch.setattr(backend, "_choose", lambda *_: "reference")
    monkeypatch.setattr(experts_reference, "moe_experts", experts)
    for module in (graph_module, generate_module):
        monkeypatch.setattr(module, "check_graph", lambda *_: None)
    with tape.emulated():
        yield


@pytest.fixture(scope="module")
def model():
    return lively().double()


@pytest.mark.parametrize("storage", ["exact", "released"])
@pytest.mark.parametrize("lengths", [[38, 38], [3, 37], [1, 1]])
@torch.no_grad()
def test_logits_are_those_of_passes_one_by_one(model, lengths, storage):
    ids, new = draw_ids(2, max(lengths)), draw_ids(12, 2, seed=1)
    caches = [model.new_cache(2, max(lengths) + len(new) + 1, storage=storage) for _ in range(2)]
    for cache in caches:
        prefill(model, ids, cache, lengths if len(set(lengths)) > 1 else None)
    repeated, model.fast_decode = TokenGraph(model, caches[0]), False
    close = 1e-9 if storage == "exact" else 0.02  # where a last bit decides a rounding, codes differ by a step
    for tokens in new:
        want = model(tokens[:, None], cache=caches[1]).logits
        assert torch.allclose(repeated(tokens), want, rtol=0, atol=close * float(want.abs().max()))
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
    after = [model(new[0][:, None], cache=cache).logits for cache in caches]  # an ordinary pass goes on from there
    assert torch.allclose(*after, rtol=0, atol=close * float(after[0].abs().max()))


@torch.no_grad()
def test_capturing_leaves_the_cache_as_it_was_and_a_full_one_is_refused(model):
    cache = model.new_cache(1, 20)
    prefill(model, draw_ids(1, 19), cache)
    before = [store.rows.clone() for layer in cache.layers for c in (layer.compressor, layer.indexer) if c
              for store in [c.store]]  # fmt: skip
    repeated = TokenGraph(model, cache)
    after = [c.store.rows for layer in cache.layers for c in (layer.compressor, layer.indexer) if c]
    assert all(map(torch.equal, before, after)) and cache.lengths.tolist() == [19]
    repeated(torch.tensor([1]))
    with pytest.raises(ValueError, match="max_length=20"):
        repeated(torch.tensor([1]))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}])
def test_generates_the_same_tokens(model, sampling):
    prompts = [draw_ids(n, seed=n) for n in (5, 12, 9)]
    plain = generate(model, prompts, max_new_tokens=8, stop=(), **sampling)
    ends = [plain[0][2]]  # a token that ends rows at different places
    for stop in ((), ends):
        want = generate(model, prompts, max_new_tokens=8, stop=stop, **sampling)
        assert generate(model, prompts, max_new_tokens=8, stop=stop, graph=True, **sampling) == want
    assert len({len(row) for row in want}) > 1


def test_what_cannot_be_a_graph_is_refused(model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="graph=True: the model is on cpu, allowed is a GPU"):
        generate(model, [1, 2], max_new_tokens=3, graph=True)
    with pytest.raises(ValueError, match="graph=True together with speculative=True"):
        graph_module.check_graph(model, speculative=True)
    with pytest.raises(ValueError, match="graph=True together with a cache"):
        graph_module.check_graph(model, cache=model.new_cache(1, 4))
    with torch.device("meta"):
        earlier = LineageTransformer(LineageConfig.load("v3"))
    with pytest.raises(ValueError, match="graph=True: the model is of 'deepseek_v3', allowed is 'deepseek_v4'"):
        graph_module.check_graph(earlier)
