"""Speculative decoding is exact: the rule on known distributions, the whole loop by walking through its branches."""

import pytest
import torch
from explorer import Explorer
from lively import draw_ids, lively
from oracle import assert_same

from abyssal.model import Transformer, generate
from abyssal.model.generation import speculative
from abyssal.model.generation.sampling import Sampling
from abyssal.model.generation.speculative import Speculation, acceptance, residual, verify

GREEDY = {"temperature": 0}


def distributions(v=7):
    """Pairs (p, q) [n, v] in float64: dense, sparse on either side, disjoint, equal, one-hot, nearly equal."""
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 40, v, generator=g, dtype=torch.float64).pow(4)
    p[10:20, :3] = 0
    q[15:25, 2:5] = 0
    p[25], q[25] = p[25] * (torch.arange(v) < 3), q[25] * (torch.arange(v) >= 3)
    q[26] = p[26]
    p[27:31] = torch.eye(v, dtype=torch.float64)[torch.tensor([0, 3, 3, 5])]
    q[28:32] = torch.eye(v, dtype=torch.float64)[torch.tensor([0, 3, 6, 1])]
    q[32] = p[32] * (1 + 1e-13 * torch.randn(v, generator=g, dtype=torch.float64))
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def test_the_rule_gives_p_exactly():
    """sum over drafts of q(d) (accept: d; reject: a draw from the residual) = p."""
    p, q = distributions()
    accepted = q * acceptance(p, q)
    rest = residual(p, q)
    rejected = (1 - accepted.sum(-1, keepdim=True)) * rest / rest.sum(-1, keepdim=True)
    assert (accepted + rejected - p).abs().max() < 1e-12
    assert ((p == 0) <= (rest == 0)).all(), "a token that p excludes"


def test_verify_follows_the_rule():
    """All drafts, and a grid of numbers for the judgement and the replacement, each cell weighted by q."""
    p, q = (x[torch.tensor([0, 7, 17, 22, 25, 26, 27, 28, 30])] for x in distributions())
    n, v, grid = len(p), p.shape[1], 200
    u = (torch.arange(grid, dtype=torch.float64) + 1) / grid
    judged, replaced = (x.flatten() for x in torch.meshgrid(u, u, indexing="ij"))
    for i in range(n):
        total = torch.zeros(v, dtype=torch.float64)
        for d in q[i].nonzero()[:, 0]:
            many = [x[i].expand(grid * grid, v) for x in (p, q)]
            token, accepted = verify(*many, d.expand(grid * grid), torch.stack([judged, replaced]))
            assert (token == d)[accepted].all() and (token != d)[~accepted].all()
            total += q[i, d] * token.bincount(minlength=v) / grid**2
        assert (total - p[i]).abs().max() < 2 / grid, f"pair {i}: {total} instead of {p[i]}"


def test_verify_with_random_numbers():
    """Chi-square of 100,000 draws of float32 distributions, after filters as in use."""
    g = torch.Generator().manual_seed(3)
    sampling = Sampling(0.9, top_k=9, top_p=0.95, min_p=0.01)
    p, q = sampling.probabilities(2 * torch.randn(2, 12, generator=g))
    n = 100_000
    draft = torch.multinomial(q, n, replacement=True, generator=g)
    u = 1 - torch.rand(2, n, generator=g, dtype=torch.float64)
    token, accepted = verify(p.expand(n, -1), q.expand(n, -1), draft, u)
    counts, want = token.bincount(minlength=12), n * p.double()
    assert not counts[want == 0].any()
    kept = want > 0
    assert ((counts - want)[kept] ** 2 / want[kept]).sum() < 27.9  # 9 degrees of freedom, p = 0.001
    overlap = torch.minimum(p, q).sum()
    assert abs(accepted.float().mean() - overlap) < 0.01 and 0.2 < overlap < 0.8


def agreeing(**changes) -> Transformer:
    """A model whose drafts are often right: both read the last token above all, and so do their heads."""
    model = lively(num_hidden_layers=3, compress_ratios=[0, 4, 16], **changes)
    with torch.no_grad():
        model.embed.weight.mul_(60)
        mtp = model.mtp[0]
        mtp.e_proj.weight.copy_(torch.eye(model.config.hidden_size) * 2)
        mtp.norm.weight.copy_(model.norm.weight)
        for collapse in (mtp.hc_head, model.hc_head):
            collapse.fn.zero_()
            collapse.base.zero_()
    return model


@pytest.fixture(scope="module")
def model():
    return agreeing()


@pytest.mark.parametrize("prompt_length", [1, 16, 40])
def test_greedy_tokens_are_those_of_plain_decoding(model, prompt_length):
    prompt = draw_ids(prompt_length, seed=prompt_length)
    plain = generate(model, prompt, max_new_tokens=30, **GREEDY)
    run = generate(model, prompt, max_new_tokens=30, stream=True, speculative=True, chunk=7, **GREEDY)
    assert list(run) == plain
    tally = run.stats.speculation
    assert 0.1 < tally.acceptance_rate < 0.95, "both branches were to be taken often"
    assert tally.passes < 29 and run.stats.acceptance_rate == tally.acceptance_rate
    assert tally.passes + tally.accepted == 29


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_as_many_tokens_as_asked(model, count):
    plain = generate(model, [5, 6, 7], max_new_tokens=count, **GREEDY)
    assert generate(model, [5, 6, 7], max_new_tokens=count, speculative=True, **GREEDY) == plain
    assert len(generate(model, [5, 6, 7], max_new_tokens=count, speculative=True, seed=count)) == count


def test_perfect_drafts_are_all_accepted(model, monkeypatch):
    """Drafts from the model itself: two tokens per pass."""
    ids = draw_ids(1, 20)
    plain = generate(model, ids, max_new_tokens=21, **GREEDY)
    whole = torch.cat([ids, torch.tensor([plain])], 1)
    at = []

    def oracle_draft(streams, next_ids, cache, lengths=None):
        at.append(len(at))
        return model(whole[:, : 21 + 2 * at[-1]])

    monkeypatch.setattr(model, "draft", oracle_draft)
    run = generate(model, ids, max_new_tokens=21, stream=True, speculative=True, **GREEDY)
    assert list(run) == plain
    assert run.stats.speculation == Speculation(passes=10, drafted=10, accepted=10)
    assert run.stats.speculation.tokens_per_pass == 2


def test_sampling_is_reproducible_and_uses_all_filters(model):
    settings = {"temperature": 0.7, "top_k": 2, "seed": 5, "speculative": True, "max_new_tokens": 20}
    prompt = draw_ids(20)
    tokens = generate(model, prompt, **settings)
    assert tokens == generate(model, prompt, **settings) != generate(model, prompt, **{**settings, "seed": 6})
    logits = model(torch.cat([prompt, torch.tensor(tokens)])[None]).logits[0, 19:-1]
    ranks = (logits > logits.gather(-1, torch.tensor(tokens)[:, None])).sum(-1)
    assert ranks.max() == 1, "top_k=2 allows the two best of the model's own distribution, and both should come"


def test_drafts_are_the_mtp_modules_own(model, monkeypatch):
    """Every draft distribution is what MTP says when it reads the whole text at once, whatever was rejected before."""
    prompt, seen = draw_ids(1, 37), []
    original = model.draft

    def recording(streams, next_ids, cache):
        out = original(streams, next_ids, cache)
        seen.append((streams.shape[1], out.logits[0, -1]))
        return out

    monkeypatch.setattr(model, "draft", recording)
    run = generate(model, prompt, max_new_tokens=40, stream=True, speculative=True, seed=1, temperature=0.03, chunk=10)
    text = torch.cat([prompt, torch.tensor([list(run)])], 1)
    tally, n = run.stats.speculation, text.shape[1]
    assert len(seen) == tally.drafted and 5 < tally.accepted < tally.drafted - 5
    streams = model(text, cache=model.new_cache(1, n)).streams
    whole = original(streams[:, :-1], text[:, 1:], model.new_draft_cache(1, n)).logits[0]
    at = 36 - model.config.sliding_window
    assert seen[0][0] == model.config.sliding_window and {new for new, _ in seen[1:]} == {1, 2}
    for number, (new, logits) in enumerate(seen):
        at += new
        assert_same(f"draft {number} at {at}", logits, whole[at], 1e-4)


def test_the_joint_distribution_of_four_tokens(monkeypatch):
    """Exact, through the caches: every draft, verdict, replacement and bonus token, weighted by its probability."""
    tiny = {"vocab_size": 3, "bos_token_id": 0, "pad_token_id": 2, "engram": None}
    tiny |= {"num_hidden_layers": 1, "compress_ratios": [4], "sliding_window": 3, "num_hash_layers": 0}
    model, sampling = lively(seed=4, **tiny), Sampling(0.3, top_p=0.9)
    prompt, explorer = [0, 2, 1], Explorer()

    def pick(p, u):
        return torch.tensor([explorer.choose(p[0])])

    def verify(p, q, draft, u):
        chance = acceptance(p, q)[0, draft]
        accepted = torch.tensor([bool(explorer.choose(torch.cat([chance, 1 - chance])) == 0)])
        return (draft if accepted else pick(residual(p, q), None)), accepted

    monkeypatch.setattr(speculative, "pick", pick)
    monkeypatch.setattr(speculative, "verify", verify)
    got, runs, going = torch.zeros(3, 3, 3, 3, dtype=torch.float64), 0, True
    while going:
        text = generate(model, prompt, max_new_tokens=4, speculative=True, temperature=0.3, top_p=0.9)
        got[tuple(text)] += explorer.weight
        runs, going = runs + 1, explorer.next_run()
    assert runs > 50
    want = torch.zeros_like(got)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 4)
    ids = torch.cat([torch.tensor(prompt).expand(81, 3), texts], 1)
    p = sampling.probabilities(model(ids).logits[:, 2:-1].flatten(0, 1).detach()).view(81, 4, 3)
    want[tuple(texts.T)] = p.gather(-1, texts[..., None]).squeeze(-1).double().prod(-1)
    assert_same("joint distribution", got, want, 1e-4)
    assert (want > 1e-3).sum() > 20
