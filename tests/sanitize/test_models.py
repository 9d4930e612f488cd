"""Whole models with every launch executed, against the references: training, Muon, prefill and decode, documents.

Blocks are those that ship. `nano` has every mechanism: sliding, CSA and HCA layers, the indexer and its loss, hash and
score routing, Engram, MTP.
"""

from copy import deepcopy

import pytest
import torch
from lively import draw_ids, lively

from abyssal.model import Transformer
from abyssal.train.optim import build_optimizer, set_learning_rate
from abyssal.train.recipe import OptimConfig

IDS = draw_ids(2, 71)


@pytest.fixture
def model() -> Transformer:
    return lively("nano").train()


@pytest.fixture
def by(monkeypatch):
    """Chooses who computes."""
    return lambda backend: monkeypatch.setenv("ABYSSAL_BACKEND", backend)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def trained(model: Transformer, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and every gradient."""
    model.zero_grad()
    loss = model(IDS[:, :-1], targets=IDS[:, 1:], **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model: Transformer, by, loss: float, gradients: float, **options) -> None:
    by("triton")
    got = trained(model, **options)
    by("reference")
    want = trained(model, **options)
    assert error(got[0], want[0]) <= loss and got[1].keys() == want[1].keys()
    worst = max((error(grad, want[1][name]), name) for name, grad in got[1].items())
    assert worst[0] <= gradients, worst


def test_a_training_pass(model, by):
    compare(model, by, 2e-7, 2e-4)


def test_a_training_pass_under_autocast(model, by):
    with torch.autocast("cuda", torch.bfloat16):
        compare(model, by, 1e-3, 0.1)


def test_packed_documents_with_padding_on_both_sides_and_layers_run_again(model, by):
    documents = torch.tensor([[-1] * 3 + [0] * 30 + [1] * 19 + [-1] * 2 + [2] * 11 + [-1] * 5, [-1] * 9 + [0] * 61])
    model.recompute = 2  # layers, run again in the backward pass
    compare(model, by, 2e-7, 2e-4, documents=documents)


def test_steps_of_muon(model, by):
    ends = {}
    for backend in ("triton", "reference"):
        by(backend)
        mine = deepcopy(model)
        optimizer = build_optimizer(mine, OptimConfig(rule="muon"))
        set_learning_rate(optimizer, 1e-3)
        for _ in range(2):
            mine(IDS[:1, :40], targets=IDS[:1, 1:41]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine.update_router_bias()
        ends[backend] = dict(mine.named_parameters())
    for name, start in model.named_parameters():
        assert error(ends["triton"][name] - start, ends["reference"][name] - start) < 0.05, name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_in_pieces_and_decoding(model, by, dtype):
    model.eval()
    logits = {}
    for backend in ("triton", "reference"):
        by(backend)
        cache = model.new_cache(batch_size=2, max_length=80)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            pieces = [model(part, cache=cache).logits for part in IDS.split([37, 21, 9, 1, 1, 1, 1], 1)]
        logits[backend] = torch.cat(pieces, 1)
    assert error(logits["triton"], logits["reference"]) < (2e-6 if dtype == torch.float32 else 2e-2)
