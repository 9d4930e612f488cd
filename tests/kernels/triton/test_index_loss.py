"""The indexer's loss in Triton against its definition in float64, by autograd: KL, gradients, what is shut out."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from abyssal.kernels import index_loss
from abyssal.kernels.index_loss import eager
from abyssal.kernels.index_loss import triton as kernels
from abyssal.kernels.index_loss.triton import launch

SCALE = 0.4
NAMES = ("loss", "share", "dq", "dweights", "dkeys")


@pytest.fixture(autouse=True)
def blocks(device, emulated, monkeypatch):
    """Blocks so small that all loops go round; the shipped ones on a GPU. Products have sides of 16 once compiled."""
    if emulated:
        side = 4 if device == "cpu" else 16
        small = launch.Blocks(max(side, 8), side, 4, 2)
        monkeypatch.setattr(launch, "table_for", lambda q, width: launch.Table(small, small, small))
        monkeypatch.setattr(launch, "next_power", lambda n, least=1: max(1 << (n - 1).bit_length(), min(least, side)))
        monkeypatch.setattr(launch, "QUERIES", 4)
        monkeypatch.setattr(launch, "ROW", 8)
        monkeypatch.setattr(launch, "LEAST", 5)
    monkeypatch.setattr(launch, "SCRATCH", 0)  # chunks of LEAST queries


def make(b, t, i, e, h, d, p, k, dtype=torch.float32, device="cpu", seed=0):
    """Student, teacher and sets; picks, where there are some, lie anywhere among the visible entries and the -1."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(device, dtype)

    student = [draw(b, t, i, e), draw(b, t, i).float(), draw(b, p, e)]
    q, c = draw(b, t, h, d), draw(b, p, d)
    start = torch.randint(0, p // 2 + 1, (b, t), generator=g)
    end = torch.minimum(start + torch.randint(0, p + 1, (b, t), generator=g), torch.tensor(p))
    index = None
    if k:
        chance = torch.rand(b, t, p, generator=g)
        entry = torch.arange(p)
        chance[(entry < start[..., None]) | (entry >= end[..., None])] = -1
        best = chance.topk(min(k, p))
        index = torch.where(best.values < 0.2, -1, best.indices)  # -1 in the middle once shuffled
        index = index[..., torch.randperm(index.shape[2], generator=g)].to(device)
    start, end = start.to(device), end.to(device)
    lse = visible_lse(q, c, start, end) + torch.rand(b, t, h, generator=g).to(device)
    return [student, (q, c, lse), {"start": start, "end": end, "index": index}]


def visible_lse(q, c, start, end):
    entry = torch.arange(c.shape[1], device=c.device)
    hidden = (entry < start[..., None]) | (entry >= end[..., None])
    s = SCALE * torch.einsum("bthd,bpd->bthp", q.float(), c.float())
    return s.masked_fill(hidden[:, :, None], -math.inf).logsumexp(-1).clamp_min(-5)


def oracle(student, teacher, seen):
    """Query by query, from the definition; and the share of the measured queries."""
    (iq, iw, ik), (q, c, lse) = student, teacher
    total, shares, queries = iq.new_zeros(()), [], 0
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            start, end = int(seen["start"][b, t]), int(seen["end"][b, t])
            queries += end > start
            mass = torch.exp(SCALE * q[b, t] @ c[b, start:end].T - lse[b, t, :, None]).sum(0)
            entries = torch.arange(start, end, device=q.device)
            if seen["index"] is not None:
                entries = seen["index"][b, t]
                entries = entries[entries >= 0]
                if t in range(q.shape[1])[eager.measured_queries(q.shape[1])] and mass.sum() > eager.FLOOR:
                    shares.append(mass[entries - start].sum() / mass.sum())
            p = mass[entries - start]
            if p.sum() > eager.FLOOR:
                p = p / p.sum()
                scores = (iw[b, t, :, None] * (iq[b, t] @ ik[b, entries].T).relu()).sum(0)
                total = total + (torch.xlogy(p, p) - p * scores.log_softmax(-1)).sum()
    share = torch.ones_like(total) if seen["index"] is None else sum(shares, total * 0) / max(len(shares), 1)
    return total / max(queries, 1), share


def results(run, student, teacher, seen, **options):
    """Loss, share and the gradients of three times the loss."""
    leaves = [x.detach().clone().requires_grad_() for x in student]
    loss, share = run(*leaves, *teacher, scale=SCALE, **seen, **options)
    return [loss.detach(), share, *torch.autograd.grad(3 * loss, leaves)]


def exact(student, teacher, seen):
    leaves = [x.detach().double().requires_grad_() for x in student]
    loss, share = oracle(leaves, [x.double() for x in teacher], seen)
    grads = torch.autograd.grad(3 * loss, leaves, allow_unused=True) if loss.requires_grad else [None] * 3
    return [loss.detach(), share.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))]


def error(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def check(student, teacher, seen, slack=3.0, floor=3e-6):
    """Each result is as near to float64 as the reference is, within a factor, and of its dtype."""
    got = results(index_loss, student, teacher, seen)
    plain = results(eager.index_loss, student, teacher, seen)
    for name, a, b, c in zip(NAMES, got, plain, exact(student, teacher, seen)):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert error(a, c) <= slack * error(b, c) + floor, f"{name}: {error(a, c):.2e}, the reference {error(b, c):.2e}"
    return got


SHAPES = {  # b, t, i, e, h, d, p, k
    "blocks": (2, 6, 3, 6, 5, 7, 17, 11),
    "all-visible": (2, 6, 3, 6, 5, 7, 17, 0),
    "one-head": (1, 6, 1, 16, 1, 16, 9, 3),
    "more-picks-than-entries": (1, 6, 2, 4, 2, 4, 3, 8),
    "one-query": (1, 1, 2, 4, 2, 4, 9, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(device, shape):
    got = check(*make(*SHAPES[shape], device=device))
    assert got[0] > 0


@pytest.mark.parametrize("k", [6, 0], ids=["picks", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions(device, dtype, k):
    """g is rounded before its products, and gradients are rounded twice: half as much error again."""
    check(*make(1, 6, 2, 8, 4, 8, 12, k, dtype=dtype, device=device), slack=2.5)


def test_keys_of_another_dtype_are_rounded(device):
    """As under autocast: bfloat16 queries, float32 keys and entries. Gradients come back in each one's dtype."""
    (iq, iw, ik), (q, c, lse), seen = make(1, 6, 2, 8, 2, 8, 12, 5, dtype=torch.bfloat16, device=device)
    near = 1 + 2**-12  # lost in bfloat16
    want = results(index_loss, (iq, iw, ik), (q, c, lse), seen)
    got = results(index_loss, (iq, iw, ik.float() * near), (q, c.float() * near, lse), seen)
    assert [x.dtype for x in got[2:]] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want)) and torch.equal(got[4].bfloat16(), want[4])


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
def test_queries_that_read_nothing_add_nothing(device, k):
    student, (q, c, lse), seen = make(1, 7, 2, 4, 2, 4, 9, k, device=device)
    lse[0, 2] = math.inf  # padding
    q[0, 3], lse[0, 3] = math.nan, math.nan
    seen["end"][0, 4] = seen["start"][0, 4]
    seen["end"][0, 2:4] = 9
    if k:
        seen["index"][0, 4] = -1
        seen["index"][0, 3, 0] = 8
    got = results(index_loss, student, (q, c, lse), seen)
    want = exact(student, (q, c, lse), seen)
    assert not got[2][0, 2:5].any() and not got[3][0, 2:5].any() and got[2][0].any()
    for name, a, b in zip(NAMES, got, want):
        assert error(a, b) < 3e-6, name


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
def test_no_query_sees_anything(device, k):
    student, teacher, seen = make(1, 6, 2, 4, 2, 4, 9, k, device=device)
    seen["end"] = seen["start"]
    if k:
        seen["index"] = torch.full_like(seen["index"], -1)
    got, want = (results(run, student, teacher, seen) for run in (index_loss, eager.index_loss))
    assert got[0] == 0 and got[1] == want[1] and not any(g.any() for g in got[2:])


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
@pytest.mark.parametrize(("b", "t", "p"), [(2, 0, 5), (2, 3, 0)], ids=["no-queries", "no-entries"])
def test_empty(device, b, t, p, k):
    student, teacher, seen = make(b, t, 2, 4, 2, 4, p, k, device=device)
    got, want = (results(run, student, teacher, seen) for run in (index_loss, eager.index_loss))
    for name, a, b in zip(NAMES, got, want):
        assert a.shape == b.shape and torch.equal(a, b), name


@pytest.mark.parametrize("k", [5, 0], ids=["picks", "all"])
def test_scores_and_logits_that_are_large(device, k):
    (iq, iw, ik), (q, c, _), seen = make(1, 6, 2, 4, 2, 4, 9, k, device=device)
    q, iw, c[0, 4] = 60 * q.abs(), 300 * iw, -5.0  # the mass of entry 4 is 0
    check((iq, iw, ik), (q, c, visible_lse(q, c, seen["start"], seen["end"])), seen, floor=1e-5)


def test_the_first_picks_may_be_none(device):
    student, teacher, seen = make(1, 6, 2, 4, 2, 4, 20, 11, device=device)
    seen["index"][..., :8] = -1  # a whole block of a row
    check(student, teacher, seen)


def test_a_shut_relu_passes_nothing(device):
    (iq, iw, ik), teacher, seen = make(1, 6, 2, 4, 2, 4, 9, 5, device=device)
    ik = torch.where(torch.arange(9, device=device)[:, None] % 2 == 0, 0.0, ik)  # hits of exactly 0
    iq[0, :, 1] = 0
    got = check((iq, iw, ik), teacher, seen)
    assert not got[2][0, :, 1].any() and not got[4][0, ::2].any()


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
def test_nan_stays_with_those_who_look_at_it(device, k):
    """A NaN index key spoils the loss, and the gradients of the queries that compare it, no others."""
    student, teacher, seen = make(1, 7, 2, 4, 2, 4, 9, k, device=device)
    clean = results(index_loss, student, teacher, seen)
    entry = 6
    looks = (seen["start"] <= entry) & (seen["end"] > entry)
    if k:
        looks = (seen["index"] == entry).any(-1)
    assert 0 < looks.sum() < looks.numel()
    student[2][0, entry] = math.nan
    got = results(index_loss, student, teacher, seen)
    assert got[0].isnan() and torch.equal(got[2].isnan().flatten(2).any(-1), looks)
    assert torch.equal(got[2][~looks], clean[2][~looks]) and torch.equal(got[3][~looks], clean[3][~looks])


@pytest.mark.parametrize("k", [6, 0], ids=["picks", "all"])
def test_chunks_and_spans_change_only_the_rounding(device, monkeypatch, k):
    inputs = make(2, 6, 2, 4, 2, 4, 12, k, device=device)
    want = results(index_loss, *inputs)
    again = results(index_loss, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(want, again)), "run to run"
    monkeypatch.setattr(launch, "SCRATCH", 1 << 28)
    monkeypatch.setattr(launch, "PROGRAMS", 18)  # three spans
    for name, a, b in zip(NAMES, results(index_loss, *inputs), want):
        if name in ("dq", "dweights"):
            assert torch.equal(a, b), name
        assert error(a, b) < 1e-6, name


@pytest.mark.parametrize("k", [6, 0], ids=["picks", "all"])
def test_a_query_does_not_depend_on_the_rest(device, k):
    """Gradients of a prefix, up to the number of queries, which scales them."""
    student, teacher, seen = make(2, 7, 2, 4, 2, 4, 9, k, device=device)
    full = launch.index_loss(*student, *teacher, SCALE, *seen.values(), True)
    some = (slice(1, 2), slice(0, 6))
    part = launch.index_loss(
        student[0][some], student[1][some], student[2][1:], teacher[0][some], teacher[1][1:], teacher[2][some],
        SCALE, *(x if x is None else x[some] for x in seen.values()), True,
    )  # fmt: skip
    assert torch.equal(full.dq[some], part.dq) and torch.equal(full.dweights[some], part.dweights)


def test_strided_inputs(device):
    student, teacher, seen = make(2, 6, 2, 4, 3, 4, 9, 5, device=device)
    want = results(index_loss, student, teacher, seen)
    strided = [[x.mT.contiguous().mT for x in xs] for xs in (student, teacher)]
    seen = {name: torch.stack([x, x + 7], -1)[..., 0] for name, x in seen.items()}
    leaves = [x.requires_grad_() for x in strided[0]]
    loss, share = index_loss(*leaves, *strided[1], scale=SCALE, **seen)
    got = loss, share, *torch.autograd.grad(loss * 3, leaves)
    assert not any(x.is_contiguous() for x in [*strided[0], *strided[1], *seen.values()])
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_ranges_shared_by_all_rows(device):
    student, teacher, seen = make(2, 6, 2, 4, 2, 4, 9, 0, device=device)
    seen = {**seen, "start": seen["start"][:1] * 0, "end": seen["end"][:1]}
    whole = {**seen, "start": seen["start"].expand(2, -1), "end": seen["end"].expand(2, -1)}
    want = exact(student, teacher, whole)
    for name, a, b in zip(NAMES, results(index_loss, student, teacher, seen), want):
        assert error(a, b) < 3e-6, name


def test_the_share_is_measured_on_evenly_spaced_queries():
    for t, count in ((0, 0), (1, 1), (32, 32), (33, 17), (64, 32), (1000, 32), (1 << 20, 32)):
        queries = range(t)[eager.measured_queries(t)]
        assert len(queries) == count and (not t or queries[-1] == t - 1)


def test_the_share_of_many_queries(device):
    student, teacher, seen = make(1, 67, 1, 4, 1, 4, 6, 3, device=device)
    with torch.no_grad():
        got, want = (index_loss(*student, *teacher, scale=SCALE, **seen, backend=b)[1] for b in ("triton", "eager"))
    assert error(got, want) < 1e-6 and 0.1 < got < 0.95
    assert error(got, oracle(student, teacher, seen)[1]) < 1e-6


def test_only_what_is_asked_for(device):
    student, teacher, seen = make(1, 6, 2, 4, 2, 4, 9, 4, device=device)
    want = results(index_loss, student, teacher, seen)
    for only in range(3):
        leaves = [x.clone().requires_grad_(n == only) for n, x in enumerate(student)]
        constants = [x.clone().requires_grad_() for x in teacher]
        loss, share = index_loss(*leaves, *constants, scale=SCALE, **seen)
        assert not share.requires_grad
        grads = torch.autograd.grad(3 * loss, [leaves[only], *constants], allow_unused=True)
        assert torch.equal(grads[0], want[2 + only]) and grads[1:] == (None, None, None)
    with torch.no_grad():
        loss, share = index_loss(*student, *teacher, scale=SCALE, **seen)
    assert torch.equal(loss, want[0]) and torch.equal(share, want[1])


def test_nothing_is_kept_without_gradients(device):
    student, teacher, seen = make(1, 6, 2, 4, 2, 4, 9, 4, device=device)
    out = launch.index_loss(*student, *teacher, SCALE, *seen.values(), False)
    assert [x.numel() for x in out[3:]] == [0, 0, 0]


def test_backward_twice_and_checkpointing(device):
    student, teacher, seen = make(1, 6, 2, 4, 2, 4, 9, 4, device=device)
    leaves = [x.requires_grad_() for x in student]

    def run(*leaves):
        loss, share = index_loss(*leaves, *teacher, scale=SCALE, **seen)
        return 3 * loss + share

    loss = run(*leaves)
    once, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    for reentrant in (False, True):
        for x in leaves:
            x.grad = None
        checkpoint(run, *leaves, use_reentrant=reentrant).backward()
        assert all(torch.equal(x.grad, g) for x, g in zip(leaves, once))


@pytest.fixture
def real_memory(monkeypatch, backend, blocks):
    """Fake tensors cannot be filled with NaN."""
    monkeypatch.undo()
    monkeypatch.setenv("ABYSSAL_BACKEND", "triton")


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
def test_opcheck(real_memory, device, k):
    student, teacher, seen = make(1, 3, 2, 16, 2, 16, 6, k, device=device)
    leaves = [x.requires_grad_() for x in student]
    torch.library.opcheck(kernels._index_loss, (*leaves, *teacher, SCALE, *seen.values(), True))


@pytest.mark.parametrize("k", [4, 0], ids=["picks", "all"])
def test_compiles_without_a_graph_break(real_memory, device, k):
    student, teacher, seen = make(1, 3, 2, 16, 2, 16, 6, k, device=device)
    leaves = [x.requires_grad_() for x in student]

    def run(*leaves):
        loss, share = index_loss(*(x.sin() for x in leaves), *teacher, scale=SCALE, **seen)
        return loss.exp() + share

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(*leaves), leaves) for f in (run, compiled))
    assert all(torch.equal(a, b) for a, b in zip(want, got))
