"""N-gram models of bytes to be compared with: interpolated modified Kneser-Ney smoothing, orders 1 to 7.

    P_n(c | h) = ( n(h c) - D(n(h c)) ) / n(h .)  +  r(h) · P_{n-1}(c | h without its oldest byte),   P_0 = 1 / 256
    r(h)       = Σ_c D(n(h c)) / n(h .)             the mass that the discounts set free
    n          of the highest order counts bytes in the text, below it the different bytes before `h c` (continuations)
    D(n)       = n - (n + 1) · Y · m_{n+1} / m_n,  Y = m_1 / (m_1 + 2 m_2),  m_i = number of entries counted i times,
                 one discount for each of n = 1, 2 and >= 3 (Chen and Goodman 1999, section 3)

A context that was never seen passes its whole mass down. Contexts start at a document's bos and never reach across it;
GAP stands before text whose beginning is not there, and what would reach back to it is not counted.

An n-gram is 9 bits a symbol, its byte lowest and its oldest symbol highest: seven fit into 63 bits.
"""

from collections.abc import Collection

import numpy as np

from .tokenizers import BOS

BYTES = 256
GAP = 257
WIDTH = np.uint64(9)
MOST = 7  # symbols of an n-gram


def kneser_ney(train: np.ndarray, text: np.ndarray, orders: Collection[int]) -> dict[int, np.ndarray]:
    """-log2 P of every token of `text` by models of these orders, [tokens] each; 0 where the token is no byte.

    `train`, `text`: streams of bytes, each document behind its BOS, in `train` a piece of one behind GAP too.

    Raises:
        ValueError: an order that is not in 1 .. 7.
    """
    if not orders or not 1 <= min(orders) <= max(orders) <= MOST:
        raise ValueError(f"orders={sorted(orders)}: allowed are 1 to {MOST}")
    grams, asked = _grams(train, max(orders)), _grams(text, max(orders))
    lower, found, here = np.full(len(asked), 1 / BYTES), {}, _counted(grams, 1)
    for order in range(1, max(orders) + 1):
        shorter = _ending(asked, order)
        if order in orders:
            found[order] = np.zeros(len(text))
            found[order][text < BYTES] = -np.log2(_probability(here, shorter, lower))
        if order < max(orders):
            here = _counted(grams, order + 1)
            continued = np.unique(_ending(here[0], order), return_counts=True)
            lower = _probability(continued, shorter, lower)
    return found


def _probability(counted: tuple[np.ndarray, np.ndarray], grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """That of the last byte of each of `grams`, from counts of one order and the probabilities of the order below."""
    known, counts = counted
    if not len(known):
        return lower
    contexts, discounts = known >> WIDTH, _discounts(counts)
    starts = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))
    total = np.add.reduceat(counts, starts)
    reserve = np.add.reduceat(discounts[np.minimum(counts, 3)], starts)
    at, seen = _find(known, grams)
    count = np.where(seen, counts[at], 0)
    at, seen = _find(contexts[starts], grams >> WIDTH)
    mass = count - discounts[np.minimum(count, 3)] + reserve[at] * lower
    return np.where(seen, mass / total[at], lower)


def _find(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in `known`, sorted, and whether it is there."""
    at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    return at, known[at] == asked


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0), D(1), D(2), D(3 and more). Kept within [0.1, n]: tiny corpora lack some of the counts of counts."""
    times = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    share = times[1] / max(times[1] + 2 * times[2], 1)
    found = [n - (n + 1) * share * times[n + 1] / max(times[n], 1) for n in (1, 2, 3)]
    return np.array([0.0, *(min(max(value, 0.1), n) for n, value in zip((1, 2, 3), found))])


def _grams(tokens: np.ndarray, order: int) -> np.ndarray:
    """Each byte of the stream with the symbols before it; before bos, or a gap, that itself is repeated."""
    grams, symbol = tokens.astype(np.uint64), tokens
    for back in range(1, order):
        symbol = np.where(symbol < BYTES, np.append(BOS, symbol[:-1]).astype(np.uint16), symbol)
        grams |= symbol.astype(np.uint64) << WIDTH * np.uint64(back)
    return grams[tokens < BYTES]


def _ending(grams: np.ndarray, order: int) -> np.ndarray:
    """Their last `order` symbols."""
    return grams & ((np.uint64(1) << WIDTH * np.uint64(order)) - np.uint64(1))


def _counted(grams: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams of this order that reach back to no gap, sorted, and how often each is there."""
    grams = _ending(grams, order)
    return np.unique(grams[grams >> WIDTH * np.uint64(order - 1) != GAP], return_counts=True)
