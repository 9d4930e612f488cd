"""Kneser-Ney models of every order against dictionaries of counts and the formulas read aloud."""

import math
from collections import Counter

import numpy as np
import pytest

from abyssal.train.data.corpus import Document
from abyssal.train.data.kneser_ney import GAP, kneser_ney
from abyssal.train.data.rows import BOS, Stream

TRAIN = [b"abracadabra", b"abacab", b"cadabra bracadab", b"a", b"banana banana band"]
HELD_OUT = [b"abra banana", b"zzz", b"cab\x00", b"banana banana banana"]
ORDERS = range(1, 8)


def stream(texts: list[bytes]) -> np.ndarray:
    return Stream([Document(str(i), text) for i, text in enumerate(texts)], 8).tokens


def one(train: np.ndarray, text: np.ndarray, order: int) -> np.ndarray:
    return kneser_ney(train, text, [order])[order]


class Oracle:
    """Interpolated modified Kneser-Ney with dictionaries; `pieces` of documents have no bos before them."""

    def __init__(self, texts: list[bytes], order: int, pieces: tuple[bytes, ...] = ()):
        self.order = order
        padded = [[BOS] * (order - 1) + [*text] for text in texts] + [[*piece] for piece in pieces]
        grams = [
            Counter(tuple(symbols[i - n + 1 : i + 1]) for symbols in padded for i in range(n - 1, len(symbols)))
            for n in range(1, order + 1)
        ]
        grams = [Counter({gram: count for gram, count in each.items() if gram[-1] != BOS}) for each in grams]
        longer = [Counter(gram[1:] for gram in each) for each in grams[1:]]
        self.counts = [*longer, grams[-1]]  # of orders 1, 2, ...

    def discount(self, order: int, count: int) -> float:
        times = Counter(self.counts[order - 1].values())
        y = times[1] / max(times[1] + 2 * times[2], 1)
        n = min(count, 3)
        value = n - (n + 1) * y * times[n + 1] / max(times[n], 1)
        return min(max(value, 0.1), n)

    def probability(self, context: tuple, byte: int) -> float:
        order = len(context) + 1
        lower = self.probability(context[1:], byte) if context else 1 / 256
        following = {gram[-1]: n for gram, n in self.counts[order - 1].items() if gram[:-1] == context}
        if not following:
            return lower
        total = sum(following.values())
        kept = following[byte] - self.discount(order, following[byte]) if byte in following else 0.0
        reserve = sum(self.discount(order, n) for n in following.values())
        return (kept + reserve * lower) / total

    def bits(self, texts: list[bytes]) -> list[float]:
        found = []
        for text in texts:
            padded = [*[BOS] * (self.order - 1), *text]
            ends = range(self.order - 1, len(padded))
            found += [0.0]
            found += [-math.log2(self.probability(tuple(padded[i - self.order + 1 : i]), padded[i])) for i in ends]
        return found


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_dictionary_oracle(order):
    bits = one(stream(TRAIN), stream(HELD_OUT), order)
    np.testing.assert_allclose(bits, Oracle(TRAIN, order).bits(HELD_OUT), rtol=1e-9)


def test_one_pass_gives_every_order_what_it_gives_alone():
    train, text = stream(TRAIN), stream(HELD_OUT)
    together = kneser_ney(train, text, ORDERS)
    assert all(np.array_equal(together[order], one(train, text, order)) for order in ORDERS)
    assert len({bits.sum() for bits in together.values()}) == len(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_that_reaches_back_to_a_gap_is_counted(order):
    pieces = b"abra", b"b", b"cadabra banana"
    train = np.concatenate([stream(TRAIN[:2]), *([GAP, *piece] for piece in pieces)]).astype(np.uint16)
    bits = one(train, stream(HELD_OUT), order)
    np.testing.assert_allclose(bits, Oracle(TRAIN[:2], order, pieces).bits(HELD_OUT), rtol=1e-9)
    assert np.allclose(one(np.array([GAP, 97], np.uint16), stream([b"xy"]), 5), [0, 8, 8])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("context", [b"ab", b"zz", b"banana", b"", b"\xff\x00"])
def test_probabilities_of_all_bytes_sum_to_one(context, order):
    text = stream([context + bytes([byte]) for byte in range(256)])
    bits = one(stream(TRAIN), text, order)[len(context) + 1 :: len(context) + 2]
    assert math.isclose(sum(2.0**-bits), 1, rel_tol=1e-9)
    assert np.isfinite(bits).all()


@pytest.mark.parametrize("order", ORDERS)
def test_context_never_reaches_across_documents(order):
    alone = one(stream(TRAIN), stream([b"cab"]), order)
    assert np.array_equal(one(stream(TRAIN), stream([b"abra", b"cab"]), order)[-4:], alone)
    counted = (one(stream(texts), stream([b"xyzq"]), order) for texts in ([b"xy", b"zq"], [b"zq", b"xy"]))
    assert np.array_equal(*counted)


def test_learns_more_than_frequencies():
    text = stream([b"the cat sat on the mat and the rat ran " * 30])
    bits = kneser_ney(text, text, (1, 3, 5))
    assert bits[5].mean() < bits[3].mean() < 0.4 * bits[1].mean()


@pytest.mark.parametrize("orders", [(), (0, 3), (8,)])
def test_other_orders_are_refused(orders):
    with pytest.raises(ValueError, match="allowed are 1 to 7"):
        kneser_ney(stream(TRAIN), stream(HELD_OUT), orders)
