"""Speculative decoding with the MTP module: two tokens from one pass of the model, if the first was guessed (V3 5.4.3).

    q = MTP(streams at t, token t + 1),  draft d ~ q;   p, p' = the model after token t + 1, and after d
    d is accepted with probability min(1, p(d) / q(d)), and then a token is drawn from p';
    otherwise d is replaced by a token drawn from (p - q)+ / sum (p - q)+

What comes out has the distribution p of plain decoding, whatever q is (Leviathan et al., arXiv 2211.17192):
q(x) min(1, p(x) / q(x)) + (1 - sum min(p, q)) (p(x) - q(x))+ / sum (p - q)+ = p(x). At temperature 0 both are one-hot
and the tokens are those of plain decoding.

p and q are taken after all filters. The main cache is cut back by the rejected draft; the draft's own cache takes
positions only once they are accepted, and of the prompt the last window alone, which is all that its block can see.

A constraint masks all three: q and p where the draft stands, p' after the draft, which is taken on trial. Where it
writes another token than the one drawn (see `constrain.ending`), it does so to drafts and to verdicts: what is written
is a function of a token with the distribution p, and a draft is accepted if what is written is what was tried.

b rows · v vocabulary · w window
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cache import Cache
from ..text.constrain.walk import Guide
from ..transformer import Output, Transformer
from .prefill import prefill
from .sampling import Draws, Sampling, pick


@dataclass
class Speculation:
    """How the drafts fared: the passes after the prompt, the drafts that they judged, those that they accepted."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts; 0 if there was none."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_pass(self) -> float:
        """Each pass gives a token, and one more where it accepts a draft."""
        return 1 + self.accepted / max(self.passes, 1)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q) of every token; 1 where q is 0."""
    return torch.where(p < q, p / q, 1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)+ [b, v], from which a rejected draft's replacement is drawn; p itself where rounding leaves nothing."""
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def verify(p: Tensor, q: Tensor, draft: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token that comes after all, and whether it is the draft.

    Args:
        p, q: the model's and the draft's distribution, [b, v].
        draft: int64 [b], drawn from q.
        u: [2, b] uniform numbers in (0, 1]: one judges, one draws the replacement.
    """
    p, q = p.double(), q.double()
    accepted = u[0].to(p) <= acceptance(p, q).gather(-1, draft[:, None]).squeeze(-1)
    return torch.where(accepted, draft, pick(residual(p, q), u[1])), accepted


@torch.no_grad()
def speculate(
    model: Transformer,
    ids: Tensor,
    caches: tuple[Cache, Cache],
    sampling: Sampling,
    draws: Draws,
    count: int,
    tally: Speculation,
    chunk: int | None = None,
    guide: Guide | None = None,
) -> Iterator[int]:
    """`count` >= 1 tokens after ids [1, t], fewer if the guide's text is complete before.

    Args:
        caches: an empty one of the model with `rewind` of at least 1, for t + count tokens, and one for its drafts.
        tally: is added to as drafts are judged.
        guide: of one row; None = free.
    """
    guide = Guide([None], count) if guide is None else guide

    def distribution(logits: Tensor) -> Tensor:
        return sampling.probabilities(guide.mask(logits, [0]))

    main, drafts = caches
    window = model.config.sliding_window
    read = prefill(model, ids, main, chunk=chunk, keep_streams=window)
    token = guide.take(pick(distribution(read.logits[:, -1]), draws.uniform([0])), [0])
    streams, follow = read.streams, torch.cat([ids[:, 1:], token[None]], 1)[:, -window:]
    yield int(token)
    left = count - 1
    while left > 1 and not guide.ended(0):
        q = distribution(_last(model.draft(streams, follow, drafts)).logits[:, 0])
        draft = pick(q, draws.uniform([0]))
        tried = guide.take(draft, [0])
        out = model(torch.stack([token, tried], 1), cache=main)
        guide.back(0)
        p = distribution(out.logits[:, 0])
        drawn, _ = verify(p, q, draft, draws.uniform([0, 0])[:, None])
        token = guide.take(drawn, [0])
        accepted = bool(token == tried)
        new = token[None]
        tally.passes += 1
        tally.drafted += 1
        tally.accepted += accepted
        yield int(token)
        if accepted and not guide.ended(0):
            token = guide.take(pick(distribution(out.logits[:, 1]), draws.uniform([0])), [0])
            new = torch.stack([tried, token], 1)
            yield int(token)
        elif not accepted:
            main.truncate(main.lengths - 1)
        streams, follow = out.streams[:, : new.shape[1]], new
        left -= new.shape[1]
    if left and not guide.ended(0):
        tally.passes += 1
        yield int(guide.take(pick(distribution(model(token[None], cache=main).logits[0]), draws.uniform([0])), [0]))


def _last(out: Output) -> Output:
    """The last position alone: the others' logits are not wanted."""
    return replace(out, hidden=out.hidden[:, -1:])
