"""Variable tracking (RULER's VT): chains of assignments, and which value a variable has.

    . k3 v7 . . k1 k3 . . k5 k1 . . ? k1 . ? k5      targets: v7 at the last k1 (1 hop), v7 at the last k5 (2 hops)

Each chain begins with a value and is passed on HOPS times, each statement after the one that it names; statements of
several chains are mixed. The distance is that to the value; answers are scored by their hops, as tracking-0, -1, ...
"""

from typing import ClassVar

import numpy as np

from .haystack import ASKED, Haystack
from .task import Row

HOPS = 3


class Tracking(Haystack):
    name: ClassVar[str] = "tracking"

    def row(self, draw: np.random.Generator, length: int) -> Row:
        row, chains, links = self.hay(draw, length), self.config.statements // (HOPS + 1), HOPS + 1
        keys = self.some_keys(draw, chains * links).reshape(chains, links)
        turn = np.argsort(draw.permutation(np.repeat(np.arange(chains), links)), kind="stable")
        place = self.scattered(draw, length, keys.size)[turn].reshape(chains, links)  # of each chain, in order
        row.ids[place], row.ids[place[:, 1:] + 1] = keys, keys[:, :-1]
        row.ids[place[:, 0] + 1] = self.some_values(draw, chains)
        for number, asked in enumerate(draw.integers(keys.size, size=ASKED).tolist()):
            chain, hops = divmod(asked, links)
            position, evidence = self.question(row, number, int(keys[chain, hops])), place[chain, 0] + 1
            row.ask(position, row.ids[evidence], position - evidence, f"{self.name}-{hops}")
        return row
