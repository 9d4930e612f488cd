"""What fixes the tables of an Engram layer, as pure functions of a few integers: primes, offsets and multipliers.

Every (layer, order, head) has its own prime modulus, a little above the nominal table size. The heads of one order
share one mix of the n-gram and differ in the modulus alone: two n-grams that collide in one head rarely do in another.
Sizes in V4.1: layers 1 and 14, orders 2 to 4, 8 heads, 16,000,000 rows a head: 384,006,168 and 384,016,682 rows.
(Engram, arXiv 2601.07372, section 2.2.)
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

INT64_MAX = 2**63 - 1
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide primality of every number below 3e24 (Miller-Rabin)
LAYER_SEED = 10007
MODULI = 4096  # of all layers and orders; V4.1 has 48


class EngramLayout(NamedTuple):
    """One layer's `multipliers [N]`, `moduli [N - 1, heads]`, `offsets [(N - 1) heads]` and the `rows` of its table."""

    multipliers: list[int]
    moduli: list[list[int]]
    offsets: list[int]
    rows: int


def engram_layout(
    layers: Sequence[int], *, classes: int, vocab_size: int, max_ngram: int, heads: int, seed: int = 0
) -> dict[int, EngramLayout]:
    """The addressing of every Engram layer; the order of `layers` decides who gets which primes.

    Args:
        layers: 0-based layer ids, in the order in which primes are given out.
        classes: canonical token ids, `V'`.
        vocab_size: nominal rows of one head.
        max_ngram: the highest order, N; orders are 2..N.
        heads: heads per order.
        seed: of the multipliers.

    Raises:
        ValueError: an argument is out of range.
    """
    primes = engram_primes(vocab_size, len(layers), max_ngram, heads)
    return {
        layer: EngramLayout(
            multipliers=engram_multipliers(classes, max_ngram, layer, seed).tolist(),
            moduli=moduli,
            offsets=[0, *accumulate(chain(*moduli))][:-1],
            rows=sum(chain(*moduli)),
        )
        for layer, moduli in zip(layers, primes)
    }


def engram_primes(vocab_size: int, layers: int, max_ngram: int, heads: int) -> list[list[list[int]]]:
    """Moduli `[layer][order][head]`: each search starts at `vocab_size` and passes over the primes already given out.

    Raises:
        ValueError: an argument is out of range.
    """
    _at_least(2, vocab_size=vocab_size, max_ngram=max_ngram)
    _at_least(1, heads=heads)
    count = layers * (max_ngram - 1) * heads
    if count > MODULI:
        raise ValueError(f"layers x (max_ngram - 1) x heads = {layers} x {max_ngram - 1} x {heads}: at most {MODULI}")
    fresh = _primes_from(vocab_size)
    return [[[next(fresh) for _ in range(heads)] for _ in range(max_ngram - 1)] for _ in range(layers)]


def engram_multipliers(classes: int, max_ngram: int, layer: int, seed: int = 0) -> np.ndarray:
    """Odd int64 multipliers `[N]` of a layer, so small that `classes * m < 2^63`; drawn from `seed + 10007 layer`.

    Raises:
        ValueError: an argument is out of range.
    """
    _at_least(2, max_ngram=max_ngram)
    _at_least(1, classes=classes)
    _at_least(0, layer=layer, seed=seed)
    bound = max(1, INT64_MAX // classes // 2)
    draws = np.random.default_rng(seed + LAYER_SEED * layer).integers(0, bound, size=max_ngram, dtype=np.int64)
    return 2 * draws + 1


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def _primes_from(start: int) -> Iterator[int]:
    n = start
    while True:
        if _is_prime(n):
            yield n
        n += 1


def _is_prime(n: int) -> bool:
    """Miller-Rabin with enough witnesses to be exact."""
    if n < 2 or any(n % p == 0 for p in WITNESSES):
        return n in WITNESSES
    twos = (n - 1 & 1 - n).bit_length() - 1
    odd = n - 1 >> twos
    for witness in WITNESSES:
        x = pow(witness, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True
