"""Whole models with every launch executed, against the references: training, Muon, prefill and decode, documents.

Blocks are those that ship. `nano` has every mechanism: sliding, CSA and HCA layers, the indexer and its loss, hash and
score routing, Engram, MTP; so has `short`, with one layer of each kind. Time goes by the program: most launches have
one per token, Muon's one or more per matrix, a table's gradient one per row. So sequences are just long enough to leave
a window, to fill compressed entries and begin another, and for the indexer to leave entries out; the two of `nano` have
over 64 tokens together, so that most kernels of blocks of tokens have programs to race (all have in the kernel tests).
"""

from copy import deepcopy

import pytest
import torch
from lively import draw_ids, lively

from abyssal.model import Transformer
from abyssal.model.routing import record_picks, record_routing, replay_picks, replay_routing
from abyssal.train.optim import build_optimizer, set_learning_rate
from abyssal.train.settings import OptimConfig

IDS = draw_ids(2, 41)
ENGRAM = {
    "layers": [1],
    "max_ngram": 3,
    "heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "kernel_size": 4,
    "pad_token_id": 258,
}
SHORT = {
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 8],
    "sliding_window": 8,
    "index_topk": 2,
    "n_routed_experts": 4,
    "engram": ENGRAM,
}


@pytest.fixture
def short() -> Transformer:
    return lively("nano", **SHORT).train()


@pytest.fixture
def by(monkeypatch):
    """Chooses who computes."""
    return lambda backend: monkeypatch.setenv("ABYSSAL_BACKEND", backend)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def trained(model: Transformer, ids: torch.Tensor, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(ids[:, :-1], targets=ids[:, 1:], **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Transformer, by, ids: torch.Tensor, **options) -> None:
    by("triton")
    got = trained(model, ids, **options)
    by("eager")
    want = trained(model, ids, **options)
    assert error(got[0], want[0]) <= 2e-7 and got[1].keys() == want[1].keys()
    worst = max((error(grad, want[1][name]), name) for name, grad in got[1].items())
    assert worst[0] <= 2e-4, worst


def test_a_training_pass_of_nano(by):
    compare(lively("nano", index_topk=4, engram=ENGRAM).train(), by, IDS[:, :34])


def test_a_training_pass_under_autocast(by):
    """Its gradients are as near to those in float32 as those of eager under autocast, within a factor: all choose the
    experts and entries that float32 does, and Engram is out, whose gate's slope at zero makes much of a last bit.
    """
    short = lively("nano", **SHORT | {"engram": None}).train()
    by("eager")
    with record_routing(short) as routes, record_picks(short) as picks:
        want, away = trained(short, IDS[:1, :22]), {}
    experts, entries = ({layer: taken[0] for layer, taken in found.items()} for found in (routes, picks))
    for backend in ("eager", "triton"):
        by(backend)
        same = replay_routing(short, experts), replay_picks(short, entries)
        with same[0], same[1], torch.autocast("cuda", torch.bfloat16):
            loss, gradients = trained(short, IDS[:1, :22])
        assert error(loss, want[0]) < 1e-2
        away[backend] = error(*(torch.cat([x.flatten() for x in g.values()]) for g in (gradients, want[1])))
    assert away["triton"] <= 1.5 * away["eager"] < 0.5, away


def test_packed_documents_with_padding_on_both_sides_and_layers_run_again(short, by):
    documents = torch.tensor([[-1] * 3 + [0] * 17 + [1] * 10 + [-1] * 2 + [2] * 5 + [-1] * 3])
    short.recompute = 2
    compare(short, by, IDS[:1], documents=documents)


def test_a_step_of_muon(short, by):
    """The losses agree, not each update: what a gradient of few tokens leaves open is noise that Muon blows up."""
    losses: dict[str, list[float]] = {}
    for backend in ("triton", "eager"):
        by(backend)
        model = deepcopy(short)
        optimizer = build_optimizer(model, OptimConfig(rule="muon"))
        set_learning_rate(optimizer, 1e-3)
        loss = model(IDS[:1, :18], targets=IDS[:1, 1:19]).loss
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            after = model(IDS[:1, :18], targets=IDS[:1, 1:19]).loss
        losses[backend] = [float(loss), float(after)]
    assert losses["triton"] == pytest.approx(losses["eager"], rel=1e-4)
    assert losses["triton"][1] < losses["triton"][0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_in_pieces_and_decoding(short, by, dtype):
    short.eval()
    logits = {}
    for backend in ("triton", "eager"):
        by(backend)
        cache = short.new_cache(batch_size=2, max_length=30)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            pieces = [short(part, cache=cache).logits for part in IDS[:, :24].split([11, 7, 3, 1, 1, 1], 1)]
        logits[backend] = torch.cat(pieces, 1)
    assert error(logits["triton"], logits["eager"]) < (2e-6 if dtype == torch.float32 else 2e-2)
