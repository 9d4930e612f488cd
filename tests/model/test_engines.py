"""The whole `nano` model in float32 and under autocast, on a CPU and on a GPU, against its definitions in float64."""

import copy

import pytest
import torch
from lively import draw_ids, lively

from abyssal.model import generate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
T = 200
DOCUMENTS = torch.tensor([[-1] * 5 + [0] * 77 + [1] * 40 + [2] * 78, [5] * 120 + [7] * 70 + [-1] * 10])
IDS, TARGETS = draw_ids(2, T), draw_ids(2, T, seed=1)


def learnt(model, ids, targets, documents):
    """Losses, logits and gradients, on the host in float64."""
    model.zero_grad()
    out = model(ids, targets=targets, documents=documents)
    out.loss.backward()
    gradients = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    losses = {name: loss.item() for name, loss in out.losses.items()}
    return losses, out.logits.detach().cpu().double(), gradients


@pytest.fixture(scope="module")
def nano():
    return lively()


@pytest.fixture(scope="module", params=[None, DOCUMENTS], ids=["whole rows", "packed"])
def defined(request, nano):
    """The documents, and what the definitions say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABYSSAL_BACKEND", "reference")
        return request.param, learnt(copy.deepcopy(nano).double(), IDS, TARGETS, request.param)


def on(device, model, *tensors):
    return copy.deepcopy(model).to(device), *(None if x is None else x.to(device) for x in tensors)


def apart(got, want):
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients(nano, defined, device):
    documents, (losses, logits, gradients) = defined
    got = learnt(*on(device, nano, IDS, TARGETS, documents))
    assert got[0] == pytest.approx(losses, rel=1e-5)
    assert apart(got[1], logits) < 1e-5 and got[2].keys() == gradients.keys()
    worst = max((apart(got[2][name], gradient), name) for name, gradient in gradients.items())
    assert worst[0] < 1e-3, worst


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast(nano, defined, device):
    """Choices may fall otherwise where scores are close: the whole gradient is the same, tensors need not be."""
    documents, (losses, logits, gradients) = defined
    model, *given = on(device, nano, IDS, TARGETS, documents)
    with torch.autocast(device, torch.bfloat16):
        got = learnt(model, *given)
    assert got[0] == pytest.approx(losses, rel=0.02)
    assert apart(got[1], logits) < 0.05
    flat, want = (torch.cat([found[name].flatten() for name in gradients]) for found in (got[2], gradients))
    assert torch.cosine_similarity(flat, want, 0) > 0.99


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [[T], [33, 16, 1, 1, 1, 84, 64], [120] + [1] * 80], ids=["whole", "chunks", "tokens"])
@torch.no_grad()
def test_every_path_gives_the_same_logits(nano, defined, device, sizes):
    documents, (_, logits, _) = defined
    if documents is not None:
        pytest.skip("a cache holds one document")
    model, ids = on(device, nano, IDS)
    model.eval()
    cache = model.new_cache(2, T)
    got = torch.cat([model(part, cache=cache).logits.cpu().double() for part in ids.split(sizes, 1)], 1)
    assert (got - logits).abs().max() / logits.abs().max() < 1e-4


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_greedy_tokens_are_the_best_ones(nano, device):
    """Of one row and of two; by drafts too."""
    model, ids = on(device, nano, IDS)
    model.eval()
    rows = generate(model, list(ids[:, :60]), max_new_tokens=20, temperature=0.0, stop=())
    for row, written in enumerate(rows):
        alone = generate(model, ids[row, :60], max_new_tokens=20, temperature=0.0, stop=())
        drafted = generate(model, ids[row, :60], max_new_tokens=20, temperature=0.0, stop=(), speculative=True)
        text = torch.cat([ids[row, :60], torch.tensor(written, device=device)])[None]
        best = model(text).logits[0, 59:-1].argmax(-1).tolist()
        assert written == alone == drafted == best
