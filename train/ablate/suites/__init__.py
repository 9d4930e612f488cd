"""The suites that ship: questions about the architecture, asked at a size that two CPU cores answer."""

from collections.abc import Sequence

from ....model.fields import did_you_mean
from ... import own
from ..suite import Suite
from .recall import INDEXER, MQAR, NEEDLES, RULER, WARMUP
from .text import BALANCE, DENSE, DEPTH, ENGRAM, MTP, MUON, STREAMS
from .toy import TOY

EVERY = (INDEXER, WARMUP, MQAR, NEEDLES, RULER, TOY, DENSE, STREAMS, ENGRAM, MUON, MTP, BALANCE, DEPTH)
SUITES = {suite.name: suite for suite in EVERY}


def chosen(names: Sequence[str]) -> list[Suite]:
    """The suites of these names or files; none, or "all", are all that ship.

    Raises:
        ValueError: an unknown name, or a file without a suite.
        FileNotFoundError: no such file.
    """
    found: dict[str, Suite] = {}
    for name in names or ["all"]:
        if name.endswith(".py"):
            found |= own_suites(name)
        elif name in (*SUITES, "all"):
            found |= {key: suite for key, suite in SUITES.items() if name in (key, "all")}
        else:
            known = f"{', '.join(SUITES)}, all, and a FILE.py with suites of one's own"
            raise ValueError(f"suite {name!r}:{did_you_mean(name, SUITES)} allowed are {known}")
    return [suite for key, suite in SUITES.items() if key in found] + [
        suite for key, suite in found.items() if key not in SUITES
    ]


def own_suites(path: str) -> dict[str, Suite]:
    """All `Suite`s at the top of a file, by name."""
    values = vars(own.module_of(path)).values()
    found = {value.name: value for value in values if isinstance(value, Suite) and value not in SUITES.values()}
    if not found:
        raise ValueError(f"{path!r} has no Suite at the top (abyssal.train.ablate.suite)")
    taken = [name for name in found if name in SUITES]
    if taken:
        raise ValueError(f"{path!r}: suite {taken[0]!r}: allowed are names that no shipped suite has")
    return found


def listed(suites: Sequence[Suite]) -> str:
    """Every suite with its question and arms, as text."""
    lines = []
    for suite in suites:
        lines += [f"{suite.name:<10} {suite.question}"]
        lines += [f"  {arm.name:<12} {arm.label}" for arm in suite.arms]
    return "\n".join(lines)
