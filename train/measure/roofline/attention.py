"""Attention over a window and compressed entries, and the indexer that picks entries.

Counted are the pairs of query and key that are seen:

    window   sum_t min(t + 1, W)
    entries  sum_t min(k, floor((t + 1) / m))        k = all of them for heavily-compressed attention

t tokens · h heads · d head dim · w window · m ratio · p = floor(t / m) entries · k picks · s bytes of an element
"""

from dataclasses import dataclass

from .device import Work


def _window_pairs(tokens: int, window: int) -> int:
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


def _entry_pairs(tokens: int, ratio: int, picks: int | None) -> int:
    """sum_t min(picks, floor((t + 1) / ratio)), in closed form."""
    whole, rest = divmod(tokens, ratio)
    seen = ratio * (whole * (whole - 1) // 2) + whole * (rest + 1)
    if picks is None or picks >= whole:
        return seen
    surplus = whole - picks  # the entries beyond the picks that the last queries see
    return seen - (ratio * (surplus * (surplus - 1) // 2) + surplus * (rest + 1))


@dataclass(frozen=True)
class Attention:
    """`ratio` 0: the window alone; `picks` None: every entry of the past is seen."""

    tokens: int
    heads: int
    dim: int
    window: int
    ratio: int = 0
    picks: int | None = None
    itemsize: int = 2

    @property
    def entries(self) -> int:
        return self.tokens // self.ratio if self.ratio else 0

    @property
    def pairs(self) -> int:
        seen = _entry_pairs(self.tokens, self.ratio, self.picks) if self.ratio else 0
        return _window_pairs(self.tokens, self.window) + seen

    @property
    def _listed(self) -> int:
        return 4 * self.tokens * min(self.picks, self.entries) if self.picks is not None else 0

    @property
    def forward(self) -> Work:
        """Scores and values: reads q, kv, entries and picks, writes the output and its log-sum-exp."""
        t, h, d, s = self.tokens, self.heads, self.dim, self.itemsize
        moved = 2 * s * t * h * d + s * (t + self.entries) * d + self._listed + 4 * t * h
        return Work(4 * h * d * self.pairs, moved)

    @property
    def backward(self) -> Work:
        """Scores again, dp, dq and both sides of dkv: reads q, o, do, kv, entries, picks and two numbers per head,
        writes dq and, in float32, the gradient of what all heads share.
        """
        t, h, d, s = self.tokens, self.heads, self.dim, self.itemsize
        moved = 4 * s * t * h * d + (s + 4) * (t + self.entries) * d + self._listed + 8 * t * h
        return Work(10 * h * d * self.pairs, moved)

    @property
    def kept(self) -> int:
        """Bytes between forward and backward besides inputs and output: the log-sum-exp."""
        return 4 * self.tokens * self.heads


@dataclass(frozen=True)
class Indexer:
    tokens: int
    heads: int
    dim: int
    ratio: int
    picks: int
    itemsize: int = 2

    @property
    def entries(self) -> int:
        return self.tokens // self.ratio

    @property
    def pairs(self) -> int:
        """Of a query and an entry that it may see."""
        return _entry_pairs(self.tokens, self.ratio, None)

    @property
    def picked(self) -> int:
        """Of a query and an entry that it picks."""
        return _entry_pairs(self.tokens, self.ratio, self.picks)

    @property
    def _inputs(self) -> int:
        """Bytes of queries, weights and keys."""
        t, h, d, s = self.tokens, self.heads, self.dim, self.itemsize
        return s * t * h * d + s * self.entries * d + 4 * t * h

    @property
    def topk(self) -> Work:
        """Scores and picks: the scores never reach memory."""
        return Work(2 * self.heads * self.dim * self.pairs, self._inputs + 4 * self.tokens * self.picks)

    @property
    def selection(self) -> Work:
        """The picks alone, from fp32 scores in memory: reads every entry's score once."""
        return Work(0, 4 * self.pairs + 4 * self.tokens * self.picks)

    def loss(self, attention: Attention) -> Work:
        """Teacher and student on the picks: reads q, entries, lse, the indexer's inputs and the picks."""
        t, h, d, s = self.tokens, attention.heads, attention.dim, self.itemsize
        teacher = s * t * h * d + s * self.entries * d + 4 * t * h
        flops = 2 * (h * d + self.heads * self.dim) * self.picked
        return Work(flops, teacher + self._inputs + 4 * t * self.picks)

    @property
    def loss_backward(self) -> Work:
        """dq and dkeys of the student: reads the indexer's inputs and, per pick, one number; writes three gradients."""
        return Work(4 * self.heads * self.dim * self.picked, 2 * self._inputs + 8 * self.tokens * self.picks)
