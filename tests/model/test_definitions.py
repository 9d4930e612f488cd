"""The whole model on the ops' definitions, `ABYSSAL_BACKEND=reference`: what the engines and transformers compute."""

import pytest
import torch
from lively import draw_ids, lively

from abyssal.kernels import backend

DOCUMENTS = torch.tensor([[-1] * 3 + [0] * 37 + [1] * 20 + [2] * 36, [5] * 60 + [7] * 30 + [-1] * 6])
IDS, TARGETS = draw_ids(2, 96), draw_ids(2, 96, seed=1)
FORWARD = {"attention", "engram", "hyper", "index_topk", "moe_experts", "moe_route", "norm_rope", "pool"}
FORWARD |= {"exact_linear"}
TRAINING = FORWARD | {"cross_entropy", "index_loss"}


@pytest.fixture(scope="module")
def nano():
    return lively().double()


@pytest.fixture
def definitions(monkeypatch):
    """Runs a call on the definitions; they, all of `ops` and nothing else, must be what runs."""
    found, original = set(), backend._find
    monkeypatch.setattr(backend, "_find", lambda *given: found.add(original(*given)) or original(*given))

    def run(call, ops):
        found.clear()
        with monkeypatch.context() as patch:
            patch.setenv("ABYSSAL_BACKEND", "reference")
            result = call()
        assert found == {f"{op}_reference" for op in ops}
        return result

    return run


def assert_same(got, want, what):
    error = (got - want).abs().max() / want.abs().max()
    assert error <= 1e-10, f"{what}: {error:.1e}"


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "packed"])
def test_losses_and_gradients(nano, definitions, documents):
    def step():
        nano.zero_grad()
        out = nano(IDS, targets=TARGETS, documents=documents)
        out.loss.backward()
        return out, {name: parameter.grad for name, parameter in nano.named_parameters()}

    want, gradients = step()
    got, defined = definitions(step, TRAINING)
    assert_same(got.logits, want.logits, "logits")
    assert got.losses.keys() == {"lm", "mtp", "balance", "index"}
    for name in want.losses:
        assert_same(got.losses[name], want.losses[name], name)
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert_same(defined[name], gradient, name)


@torch.no_grad()
def test_chunks_and_tokens(nano, definitions):
    """A cache keeps a compressor's rows in float32, so that one pass over the whole is another by that rounding."""

    def read():
        cache = nano.new_cache(2, 96)
        return torch.cat([nano(part, cache=cache).logits for part in IDS.split([33, 16, 1, 1, 1, 44], 1)], 1)

    assert_same(definitions(read, FORWARD), read(), "chunks")


@torch.no_grad()
def test_one_token_is_no_numpy(definitions):
    model = lively()
    cache = model.new_cache(1, 24)
    model(IDS[:1, :23], cache=cache)
    definitions(lambda: model(IDS[:1, 23:24], cache=cache), FORWARD)


@torch.no_grad()
def test_transformers(definitions, tmp_path):
    """V4 in float32: sliding, CSA and HCA layers, hashed and scored routing."""
    pytest.importorskip("transformers")
    from peer import make_peer, peer_config

    from abyssal.model import load_pretrained

    peer = make_peer(peer_config(layers=(0, "csa", "hca", "csa"), num_hash_layers=1, index_n_heads=16, index_topk=6))
    peer.save_pretrained(tmp_path)
    ours, ids = load_pretrained(tmp_path), draw_ids(2, 77)
    got = definitions(lambda: ours(ids).logits, FORWARD - {"engram"})
    assert (got - peer(ids, use_cache=False).logits).abs().max() <= 5e-5
