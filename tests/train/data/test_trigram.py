"""The trigram baseline against a dictionary of counts and the formulas read aloud."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from abyssal.train.data.bits import trigram_bits_per_byte
from abyssal.train.data.corpus import Document
from abyssal.train.data.rows import BOS, Stream
from abyssal.train.data.trigram import Trigram

TRAIN = [b"abracadabra", b"abacab", b"cadabra bracadab", b"a", b"banana banana band"]
HELD_OUT = [b"abra banana", b"zzz", b"cab\x00"]


def stream(texts: list[bytes]) -> np.ndarray:
    return Stream([Document(str(i), text) for i, text in enumerate(texts)], 8).tokens


class Oracle:
    """Interpolated modified Kneser-Ney of order 3 with dictionaries."""

    def __init__(self, texts: list[bytes]):
        grams = Counter()
        for text in texts:
            padded = [BOS, BOS, *text]
            grams.update(tuple(padded[i : i + 3]) for i in range(len(text)))
        self.counts = [grams, Counter({g[1:]: 0 for g in grams}), Counter()]
        for g in grams:
            self.counts[1][g[1:]] += 1
        for g in self.counts[1]:
            self.counts[2][g[1:]] += 1

    def discount(self, level: int, count: int) -> float:
        times = Counter(self.counts[level].values())
        y = times[1] / max(times[1] + 2 * times[2], 1)
        n = min(count, 3)
        value = n - (n + 1) * y * times[n + 1] / max(times[n], 1)
        return min(max(value, 0.1), n)

    def probability(self, context: tuple, byte: int, level: int = 0) -> float:
        if level == 3:
            return 1 / 256
        following = {g[-1]: n for g, n in self.counts[level].items() if g[:-1] == context}
        lower = self.probability(context[1:], byte, level + 1)
        if not following:
            return lower
        total = sum(following.values())
        kept = following[byte] - self.discount(level, following[byte]) if byte in following else 0.0
        reserve = sum(self.discount(level, n) for n in following.values())
        return (kept + reserve * lower) / total

    def bits(self, texts: list[bytes]) -> list[float]:
        found = []
        for text in texts:
            padded = [BOS, BOS, *text]
            found.append(0.0)
            found += [-math.log2(self.probability(tuple(padded[i : i + 2]), padded[i + 2])) for i in range(len(text))]
        return found


def test_equals_the_dictionary_oracle():
    bits = Trigram(stream(TRAIN)).bits(stream(HELD_OUT))
    np.testing.assert_allclose(bits, Oracle(TRAIN).bits(HELD_OUT), rtol=1e-9)


@pytest.mark.parametrize("context", [b"ab", b"zz", b"a", b"", b"\xff\x00"])
def test_probabilities_of_all_bytes_sum_to_one(context):
    trigram = Trigram(stream(TRAIN))
    bits = [trigram.bits(stream([context + bytes([byte])]))[-1] for byte in range(256)]
    assert math.isclose(sum(2.0**-b for b in bits), 1, rel_tol=1e-9)
    assert all(map(math.isfinite, bits))


def test_context_never_reaches_across_documents():
    trigram = Trigram(stream(TRAIN))
    alone = trigram.bits(stream([b"cab"]))
    assert np.array_equal(trigram.bits(stream([b"abra", b"cab"]))[-4:], alone)
    counted = Trigram(stream([b"xy", b"zq"])), Trigram(stream([b"zq", b"xy"]))
    assert np.array_equal(*(t.bits(stream([b"xyzq"])) for t in counted))


def test_learns_more_than_frequencies():
    text = b"the cat sat on the mat and the rat ran " * 30
    bits = Trigram(stream([text])).bits(stream([text]))[1:].mean()
    frequencies = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    entropy = -sum(p * math.log2(p) for p in frequencies if p)
    assert bits < 0.4 * entropy


def test_mean_over_held_out_rows_is_the_mean_over_their_bytes(texts):
    from abyssal.train.data.corpus import load_corpus
    from abyssal.train.data.rows import held_out
    from abyssal.train.data.scored import Scored

    corpus = load_corpus(str(texts), 0.2)
    oracle = defaultdict(list)
    bits = iter(Trigram(stream([d.text for d in corpus.train])).bits(stream([d.text for d in corpus.held_out])))
    tokens = stream([d.text for d in corpus.held_out])
    for position, (token, value) in enumerate(zip(tokens, bits)):
        if token != BOS:
            oracle[(position - 1) // 48].append(value)
    rows = held_out(corpus, 48, 4)
    wanted = np.concatenate([oracle[row] for row in rows.rows.tolist()]).mean()
    scored = Scored(corpus.held_out, rows)
    assert math.isclose(trigram_bits_per_byte(corpus.train, scored), wanted, rel_tol=1e-9)
