"""Text that spells a special token: read back, it would be that token, so no token may complete its string.

    text ends in s[:k], token begins with s[k:]     ->  not allowed        for every special string s

Raw text excludes it by the grammar (`TEXT`); inside JSON, whose strings are the library's, the mask does.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np


class Spelling:
    """Which tokens a text may not go on with.

    Args:
        special: the strings of special tokens.
        pieces: each token's bytes; None for special tokens.
    """

    def __init__(self, special: Iterable[str], pieces: Sequence[bytes | None]) -> None:
        strings = [string.encode() for string in special]
        ranked = sorted((piece, token) for token, piece in enumerate(pieces) if piece)
        self.after: dict[bytes, list[int]] = {}
        for string in strings:
            for cut in range(1, len(string)):
                found = _beginning_with(string[cut:], ranked)
                if found:
                    self.after.setdefault(string[:cut], []).extend(found)
        self.longest = max(map(len, strings), default=1)
        whole = re.compile(b"|".join(map(re.escape, strings)) or b"(?!)")
        self.never = [token for piece, token in ranked if whole.search(piece)]
        self._begun = tuple(self.after)

    def exclude(self, tail: bytes, words: np.ndarray) -> None:
        """Clears those tokens' bits in int32 [w], unless nothing would be left: then the grammar wants it so."""
        if not self.never and not tail.endswith(self._begun):
            return
        tokens = self.never + [token for begun in self._begun if tail.endswith(begun) for token in self.after[begun]]
        left = words.view(np.uint32).copy()
        for token in tokens:
            left[token // 32] &= ~np.uint32(1 << token % 32)
        if left.any():
            words.view(np.uint32)[:] = left


def _beginning_with(start: bytes, ranked: Sequence[tuple[bytes, int]]) -> list[int]:
    found = []
    for piece, token in ranked[bisect_left(ranked, (start, -1)) :]:
        if not piece.startswith(start):
            break
        found.append(token)
    return found
