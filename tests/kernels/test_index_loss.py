"""`index_loss` against the definition in float64: the teacher from the joint softmax, the KL, and its gradients by
autograd.
"""

import pytest
import torch
from oracle import assert_same

from abyssal.kernels.attention import attention
from abyssal.kernels.index_loss import eager, index_loss
from abyssal.kernels.index_topk import index_topk

WINDOW, SCALE = 6, 0.4


def make(b, t, h, d, i, e, p, k, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    student = [draw(b, t, i, e), draw(b, t, i), draw(b, p, e)]
    q, kv, c, sink = draw(b, t, h, d), draw(b, t, d), draw(b, p, d), draw(h)
    end = ((torch.arange(t) + 1) * p // t)[None]
    seen = {"start": torch.zeros_like(end), "end": end}
    index = index_topk(*student, k=k, **seen) if k else None
    reach = {"index": index} if k else seen
    _, lse = attention(q, kv, c, sink, window=WINDOW, scale=SCALE, **reach)
    return [x.requires_grad_() for x in student], (q, kv, c, sink, lse), seen, index


def oracle(student, teacher, seen, index):
    """Mean over queries of the KL, by query, from the joint softmax over window, entries attended to, and sink."""
    (iq, iw, ik), (q, kv, c, sink, _) = student, teacher
    total, queries = 0.0, 0
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            end = int(seen["end"][0, t])
            entries = [j for j in index[b, t].tolist() if j >= 0] if index is not None else list(range(end))
            if not entries:
                continue
            queries += 1
            window = kv[b, max(0, t - WINDOW + 1) : t + 1]
            keys = torch.cat([window, c[b, entries]])
            joint = torch.cat([SCALE * q[b, t] @ keys.T, sink[:, None]], 1).softmax(-1)
            p = joint[:, len(window) : -1].sum(0).detach()
            p = p / p.sum()
            scores = (iw[b, t, :, None] * (iq[b, t] @ ik[b, entries].T).relu()).sum(0)
            total = total + (p * (p.log() - scores.log_softmax(-1))).sum()
    return total / max(queries, 1)


SHAPES = [
    ("picks-shared", (2, 30, 3, 8, 2, 4, 12, 5)),
    ("picks-gathered", (2, 60, 20, 4, 20, 4, 60, 2)),
    ("all-visible", (1, 41, 2, 8, 3, 4, 10, 0)),
    ("nothing-visible-at-first", (1, 9, 2, 8, 1, 4, 1, 1)),
]


@pytest.mark.parametrize("shape", [s[1] for s in SHAPES], ids=[s[0] for s in SHAPES])
def test_loss_and_gradients(shape):
    student, teacher, seen, index = make(*shape)
    q, _, c, _, lse = teacher
    loss, _ = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)
    want = oracle(student, teacher, seen, index)
    assert_same("loss", loss, want, 1e-10)
    got, expected = (torch.autograd.grad(3 * x, student) for x in (loss, want))
    for name, a, b in zip(("index_q", "index_weights", "index_keys"), got, expected):
        assert_same(f"d{name}", a, b, 1e-9)


def test_the_teacher_is_the_joint_softmax():
    """A window key that takes nearly all the mass of one head must take that head out of the teacher."""
    student, teacher, seen, index = make(1, 20, 2, 8, 2, 4, 8, 4)
    q, kv, c, sink, _ = teacher
    kv = kv.clone()
    kv[0, -1] = 30 * q[0, -1, 0]
    _, lse = attention(q, kv, c, sink, window=WINDOW, scale=SCALE, index=index)
    loss, _ = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)
    assert_same("loss", loss, oracle(student, (q, kv, c, sink, lse), seen, index), 1e-10)


def test_nothing_flows_into_the_teacher():
    student, teacher, seen, index = make(1, 20, 2, 8, 2, 4, 8, 4)
    q, _, c, _, lse = (x.clone().requires_grad_() for x in teacher)
    loss, share = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)
    assert torch.autograd.grad(loss, [q, c, lse], allow_unused=True) == (None, None, None)
    assert not share.requires_grad


def test_share_is_one_when_everything_is_picked_and_smaller_otherwise():
    for k, low, high in ((50, 1 - 1e-12, 1 + 1e-12), (2, 0.01, 0.95)):
        student, teacher, seen, index = make(1, 40, 2, 8, 2, 4, 10, k)
        q, _, c, _, lse = teacher
        assert low < float(index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)[1]) < high


def test_the_share_of_blocks_without_a_measured_query(monkeypatch):
    """Blocks of 16 queries, measured on the last of 600 alone, and on all."""
    student, teacher, seen, index = make(1, 600, 8, 4, 8, 4, 300, 20)
    q, _, c, _, lse = teacher
    shares = []
    for most in (1, 600):
        monkeypatch.setattr(eager, "MEASURED", most)
        shares.append(index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)[1])
    mass = torch.exp(SCALE * torch.einsum("bthd,bpd->bthp", q, c) - lse[..., None]).sum(2)
    mass = mass.masked_fill(torch.arange(300) >= seen["end"][..., None], 0)
    picked = torch.where(index < 0, 0, mass.gather(2, index.clamp_min(0))).sum(-1) / mass.sum(-1)
    assert_same("share of the last", shares[0], picked[0, -1], 1e-10)
    assert_same("share of all", shares[1], picked[mass.sum(-1) > 0].mean(), 1e-10)


def test_no_visible_entry_gives_zero_and_finite_gradients():
    student, teacher, seen, _ = make(1, 5, 2, 8, 2, 4, 1, 1)
    q, _, c, _, lse = teacher
    seen["end"] = torch.zeros_like(seen["end"])
    index = torch.full((1, 5, 1), -1)
    loss, _ = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)
    assert loss.item() == 0 and all(not g.any() for g in torch.autograd.grad(loss, student))


def test_bfloat16_inputs_get_bfloat16_gradients():
    student, teacher, seen, index = make(1, 30, 2, 8, 2, 4, 12, 5, dtype=torch.bfloat16)
    q, _, c, _, lse = teacher
    loss, _ = index_loss(*student, q, c, lse, scale=SCALE, index=index, **seen)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, student))
