"""Attention over a window and compressed entries.

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


def entry_pairs(tokens: int, ratio: int, picks: int | None) -> int:
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
        seen = entry_pairs(self.tokens, self.ratio, self.picks) if self.ratio else 0
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
