"""Which held-out bytes training text has as well: those inside an exact match of 32 bytes or more.

    h_1[i]  = a random number for the symbol at i;   h_2w[i] = mix(h_w[i], h_w[i + w]),  w = 1, 2, 4, 8, 16
    h_32[i] = 32 symbols from i on as 64 bits        equal by chance: 2^-64 for each pair of windows
    copied[j]  where h_32[i], for an i of j - 31 .. j, is that of some 32 bytes of a training document

The place between two documents is a symbol too, one in training text and another in held-out text, so that no window
that reaches across it matches. Training text is read once, a block at a time: memory is that of the held-out windows
(24 bytes each, and a table to look them up), and time is about a minute for each GB, of SEARCHED bytes at most.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .corpus import AnyDocument, Corpus
from .mapped import cached

WINDOW = 32  # bytes; a power of 2
SEARCHED = 1 << 32  # bytes of training text, from its beginning on
BLOCK = 1 << 16  # bytes hashed at once
TRAIN_BOS, HELD_OUT_BOS = 256, 257
FILE = "copied.npy"
_random = np.random.default_rng(WINDOW)
_KEYS = _random.integers(0, 1 << 64, 258, np.uint64)
_FACTORS = _random.integers(0, 1 << 64, WINDOW.bit_length() - 1, np.uint64) | np.uint64(1)


def copied(documents: Sequence[AnyDocument], train: Sequence[AnyDocument]) -> np.ndarray:
    """For each place in the stream of `documents` (bos and bytes of each), bool: within 32 bytes that `train` has."""
    stream = np.concatenate([*_symbols(documents, HELD_OUT_BOS)])
    known, number = np.unique(_windows(stream), return_inverse=True)
    if not len(known):
        return np.zeros(len(stream), bool)
    seen = np.zeros(len(known) + 1, bool)  # and one for those behind the last
    shift = np.uint64(64 - min(32, 6 + len(known).bit_length()))
    maybe = np.zeros(1 << (64 - int(shift)), bool)
    maybe[known >> shift] = True
    for block in _blocks(train):
        found = _windows(block)
        found = found[maybe[found >> shift]]
        place = np.searchsorted(known, found)
        seen[place[known[np.minimum(place, len(known) - 1)] == found]] = True
    starts = np.zeros(len(stream) + 1, np.int64)
    inside = np.flatnonzero(seen[number])
    np.add.at(starts, inside, 1)
    np.add.at(starts, inside + WINDOW, -1)
    return np.cumsum(starts)[:-1] > 0


def copied_of(corpus: Corpus, numbers: np.ndarray, keep: bool) -> np.ndarray:
    """`copied` for the held-out documents of these numbers; with `keep` found in the cache, or put there."""
    documents = [corpus.held_out[int(i)] for i in numbers]
    if not keep:
        return copied(documents, corpus.train)
    which = hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()
    contents = {"corpus": corpus.digest, "documents": which, "window": str(WINDOW), "searched": str(SEARCHED)}
    folder = cached("overlap", contents, lambda folder: np.save(folder / FILE, copied(documents, corpus.train)))
    return np.load(folder / FILE)


def searched(train: Sequence[AnyDocument]) -> str:
    """What `copied` compares with, in words."""
    size = sum(document.size for document in train)
    return "training text" if size <= SEARCHED else f"the first {SEARCHED / 1e9:.1f} of {size / 1e9:.1f} GB to train on"


def _blocks(train: Sequence[AnyDocument]) -> Iterator[np.ndarray]:
    """The stream of training documents in blocks that have WINDOW - 1 symbols in common, until SEARCHED is reached."""
    parts: list[np.ndarray] = []
    size = total = 0
    for part in _symbols(train, TRAIN_BOS):
        parts.append(part)
        size, total = size + len(part), total + len(part)
        if size >= BLOCK:
            block = np.concatenate(parts)
            yield block
            parts, size = [block[len(block) - WINDOW + 1 :]], 0
        if total >= SEARCHED:
            break
    yield np.concatenate(parts)


def _symbols(documents: Sequence[AnyDocument], bos: int) -> Iterator[np.ndarray]:
    for document in documents:
        yield np.array([bos], np.uint16)
        for chunk in document.chunks(BLOCK):
            yield np.frombuffer(chunk, np.uint8).astype(np.uint16)


def _windows(symbols: np.ndarray) -> np.ndarray:
    """The hash of each WINDOW symbols in a row, uint64."""
    hashes = _KEYS[symbols]
    for level, factor in enumerate(_FACTORS):
        width = 1 << level
        hashes = hashes[:-width] * factor + hashes[width:]
        hashes ^= hashes >> np.uint64(32)
    return hashes
