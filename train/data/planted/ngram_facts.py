"""Facts of n-grams: which value follows an n-gram is written in a table that a model has to learn by heart.

    bos . a b _ . . d a _ . a b _                      targets: f(a b) at each b after a, f(d a) at the a after d

The table has `facts` n-grams of distinct keys, n = order, with random values. It is the same for every seed, stage and
row, held-out ones too: what is held out are rows, never facts. Fact r (from 1) is used in proportion to r^-zipf. The
answer is not shown (a filler stands in its place): rows cannot teach a fact from within, weights have to hold it.

Instead of a distance every answer has its fact's rank. Without the n-gram all that can be had is the value that is
most often right, that of a fact of a low rank. Tokens: 0 bos · fillers · keys · values
"""

from typing import ClassVar

import numpy as np

from ...settings import PlantedConfig
from .task import Row, Task, zipf


class NgramFacts(Task):
    name: ClassVar[str] = "ngram_facts"
    options: ClassVar[tuple[str, ...]] = ("density", "keys", "values", "fillers", "order", "facts", "zipf")
    axis: ClassVar[str] = "rank of the fact (1 = most used)"

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        c, n = config, config.order
        if c.keys**n < c.facts:
            raise ValueError(f"planted.facts={c.facts}: allowed are up to {c.keys**n}, keys^order n-grams")
        self.first_filler, self.first_key = 1, 1 + c.fillers
        self.first_value = self.first_key + c.keys
        self.vocabulary = self.first_value + c.values
        draw = np.random.default_rng([c.keys, c.values, n, c.facts])
        numbers = draw.choice(c.keys**n, c.facts, replace=False)
        digits = [numbers // c.keys**i % c.keys for i in range(n)]
        self.grams = self.first_key + np.stack(digits, 1)  # [facts, n]
        self.values = self.first_value + draw.integers(c.values, size=c.facts)
        self.use = zipf(c.facts, c.zipf)

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, n = Row.blank(draw.integers(self.first_filler, self.first_key, length)), self.config.order
        cells = (length - 1) // (n + 1)
        count = self.answers(length)
        if count > cells:
            most = f"{cells} in a row of {length} tokens, one in planted.order + 1"
            raise ValueError(f"planted.density={self.config.density}: {count} answers; allowed are {most}")
        starts = 1 + (n + 1) * np.sort(draw.permutation(cells)[:count])
        facts = draw.choice(self.config.facts, count, p=self.use)
        row.ids[starts[:, None] + np.arange(n)] = self.grams[facts]
        for start, fact in zip(starts.tolist(), facts.tolist()):
            row.ask(start + n - 1, int(self.values[fact]), 1 + fact)
        return row
