"""GRPO's loss and gradient against sums written out token by token, and its KL against the sum over all outcomes."""

import math

import pytest
import torch
from torch import Tensor

from abyssal.train.reason.grpo import advantages, grpo_terms
from abyssal.train.reason.policy import entropy, log_probabilities, of_tokens

LIMITS = {"clip_low": 0.2, "clip_high": 0.3, "kl_weight": 0.07, "off_policy_limit": 0.4}


def by_hand(log_pi, log_old, log_ref, advantage, written, clip_low, clip_high, kl_weight, off_policy_limit):
    """Loss, KL sum, clipped and dropped tokens, and d loss / d log_pi, with floats and loops."""
    loss, kl_sum, clipped, dropped = 0.0, 0.0, 0, 0
    slope = [[0.0] * len(row) for row in log_pi]
    for i, a in enumerate(advantage):
        tokens = [t for t, w in enumerate(written[i]) if w]
        away = sum(log_old[i][t] - log_pi[i][t] for t in tokens) / max(len(tokens), 1)
        mask = 0.0 if a < 0 and away > off_policy_limit else 1.0
        dropped += len(tokens) * (mask == 0)
        for t in tokens:
            r = math.exp(log_pi[i][t] - log_old[i][t])
            inside = min(max(r, 1 - clip_low), 1 + clip_high)
            cut = inside * a < r * a
            loss -= mask * (inside * a if cut else r * a)
            slope[i][t] -= 0.0 if cut else mask * r * a
            clipped += bool(cut and mask)
            if log_ref is not None:
                d = log_ref[i][t] - log_pi[i][t]
                k = r * (math.exp(d) - d - 1)
                loss, kl_sum = loss + kl_weight * k, kl_sum + k
                slope[i][t] += kl_weight * (k + r * (1 - math.exp(d)))
    return loss, kl_sum, clipped, dropped, slope


def case(seed, distance=0.8):
    draw = torch.Generator().manual_seed(seed)
    old = -torch.rand(6, 5, generator=draw, dtype=torch.float64) * 3
    new = old + distance * torch.randn(6, 5, generator=draw, dtype=torch.float64)
    reference = old + 0.3 * torch.randn(6, 5, generator=draw, dtype=torch.float64)
    advantage = torch.randn(6, generator=draw, dtype=torch.float64)
    advantage[3] = 0.0
    written = torch.rand(6, 5, generator=draw) < 0.7
    written[4] = False
    return new, old, reference, advantage, written


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_kl", [True, False])
def test_loss_and_gradient_equal_the_sums_by_hand(seed, with_kl):
    new, old, reference, advantage, written = case(seed)
    new.requires_grad_()
    terms = grpo_terms(new, old, reference if with_kl else None, advantage, written, **LIMITS)
    lists = [x.tolist() for x in (new, old, reference, advantage, written)]
    if not with_kl:
        lists[2] = None
    loss, kl, clipped, dropped, slope = by_hand(*lists, **LIMITS)
    (grad,) = torch.autograd.grad(terms.loss, new)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-12)
    assert terms.kl.item() == pytest.approx(kl, rel=1e-12, abs=0)
    assert (int(terms.clipped), int(terms.off_policy)) == (clipped, dropped)
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_the_cases_reach_both_clips_and_the_mask():
    found = {"low": 0, "high": 0, "dropped": 0}
    for seed in range(4):
        new, old, _, advantage, written = case(seed)
        ratio = (new - old).exp()
        found["low"] += int((written & (ratio < 0.8) & (advantage[:, None] < 0)).sum())
        found["high"] += int((written & (ratio > 1.3) & (advantage[:, None] > 0)).sum())
        found["dropped"] += int(grpo_terms(new, old, None, advantage, written, **LIMITS).off_policy)
    assert min(found.values()) >= 1


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.4, 1.0, 0.0), (1.2, 1.0, -1.2), (0.5, 1.0, -0.5), (0.7, -1.0, 0.0), (0.9, -1.0, 0.9), (1.4, -1.0, 1.4)],
)
def test_the_clip_takes_only_what_would_pay_further(ratio, advantage, slope):
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    limits = {**LIMITS, "off_policy_limit": math.inf}
    terms = grpo_terms(
        new, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.bool), **limits
    )
    terms.loss.backward()
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)
    assert int(terms.clipped) == (slope == 0)


def test_the_mask_drops_failures_alone_and_only_beyond_the_limit():
    old = torch.zeros(4, 2, dtype=torch.float64)
    new = torch.tensor([[-0.9, -0.1], [-0.9, -0.1], [-0.3, -0.3], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    terms = grpo_terms(new, old, None, advantage, torch.ones(4, 2, dtype=torch.bool), **{**LIMITS, "clip_low": 1.0})
    terms.loss.backward()
    assert int(terms.off_policy) == 2  # tokens of the one
    assert [bool(row.any()) for row in new.grad] == [False, True, True, True]


def test_kl_is_unbiased_in_value_and_gradient_whatever_drew_the_tokens():
    """Sum over all outcomes a of pi_old(a) K(a) = KL(pi || pi_ref), and so for the gradients; plain K3's is another."""
    draw = torch.Generator().manual_seed(0)
    logits, old, reference = torch.randn(3, 7, generator=draw, dtype=torch.float64).unbind()
    logits.requires_grad_()
    log_pi, log_old, log_reference = (log_probabilities(z) for z in (logits, old, reference))
    exact = (log_pi.exp() * (log_pi - log_reference)).sum()
    (exact_grad,) = torch.autograd.grad(exact, logits, retain_graph=True)
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, 1, dtype=torch.bool)
    limits = {**LIMITS, "kl_weight": 1.0}

    def expected(drawn_from: Tensor) -> tuple[Tensor, Tensor]:
        weight = drawn_from.exp().detach()
        total, gradient = 0.0, torch.zeros_like(logits)
        for a in range(7):
            pick = slice(a, a + 1)
            columns = (log_pi[pick, None], drawn_from[pick, None].detach(), log_reference[pick, None])
            terms = grpo_terms(*columns, zero[:1], one[:1], **limits)
            total += weight[a] * terms.kl
            gradient += weight[a] * torch.autograd.grad(terms.loss, logits, retain_graph=True)[0]
        return total, gradient

    for drawn_from in (log_old, log_pi):
        value, gradient = expected(drawn_from)
        torch.testing.assert_close(value, exact.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, exact_grad, rtol=1e-10, atol=1e-12)
    plain = (log_reference - log_pi).exp() - (log_reference - log_pi) - 1
    (plain_grad,) = torch.autograd.grad((log_pi.exp().detach() * plain).sum(), logits)
    assert not torch.allclose(plain_grad, exact_grad, rtol=0.1)


def test_advantages_are_the_distance_from_the_mean_of_the_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert advantages(rewards, 4).tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert advantages(rewards, 2).tolist() == [0.5, -0.5, 0, 0, 0, 0, 0, 0]
    for bad in (torch.zeros(5), torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="rewards has shape"):
            advantages(bad, 2)


def test_groups_of_equal_rewards_give_no_gradient():
    new, old, _, _, written = case(0)
    new.requires_grad_()
    equal = advantages(torch.full((6,), 0.37, dtype=torch.float64), 3)
    assert equal.abs().max() < 1e-15
    terms = grpo_terms(new, old, None, advantages(torch.ones(6, dtype=torch.float64), 3), written, **LIMITS)
    terms.loss.backward()
    assert not new.grad.any()


def test_what_was_not_written_has_no_say():
    new, old, reference, advantage, written = case(1)
    first = grpo_terms(new, old, reference, advantage, written, **LIMITS)
    for x in (new, old, reference):
        x[~written] = 50.0
    new.requires_grad_()
    again = grpo_terms(new, old, reference, advantage, written, **LIMITS)
    again.loss.backward()
    assert again.loss.item() == first.loss.item() and again.kl == first.kl
    assert new.grad.isfinite().all() and not new.grad[~written].any()


def test_log_probabilities_are_those_of_the_sampler():
    from abyssal.model.generation.sampling import Sampling

    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for sampling in (Sampling(), Sampling(0.7), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.6)):
        p = sampling.probabilities(logits.detach())
        log_pi = log_probabilities(logits, sampling.temperature, p > 0)
        torch.testing.assert_close(log_pi.exp(), p)
        tokens = p.argmax(-1)
        torch.testing.assert_close(of_tokens(log_pi, tokens).exp(), p.amax(-1))
        by_hand = torch.tensor([-sum(q * math.log(q) for q in row if q > 0) for row in p.tolist()])
        torch.testing.assert_close(entropy(log_pi.detach()).float(), by_hand)
        (grad,) = torch.autograd.grad(of_tokens(log_pi, tokens).sum(), logits)
        assert grad.isfinite().all() and not grad[p == 0].any()
