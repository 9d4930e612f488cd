"""pytest with every Triton launch executed by ttsem: what is run, what is found, and the summary of it.

Why a test cannot run here is said once, in `CANNOT`.
"""

import collections
import datetime
import fnmatch
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import sanitized
from standins import standins
from ttsem import harness
from ttsem.sanitize import KernelFault, session

ROOT = Path(__file__).parents[2]
PINS = ("torch", "triton", "ttsem")
CANNOT = {
    "*[[]eager*": "PyTorch launches nothing of ours",
    "*_by_eager*": "PyTorch launches nothing of ours",
    "*test_moe_*::test_refusals_name_the_argument": "ids are looked at on a CPU, and here it passes for a GPU",
    "*test_pool.py::test_errors_name_the_argument": "so are windows",
    "*test_compiled.py::*": "compiles for other targets and launches nothing",
    "*opcheck*": "opcheck traces with fake tensors, which no launch can be executed on",
    "*::test_compiles_*": "torch.compile traces, and asks for a driver",
    "*::test_operator_compile_*": "torch.compile traces, and asks for a driver",
}
PLANTED = {"race", "oob_write", "oob_read"}


class Sanitizer:
    """Counts launches and faults by test file, and the programs of each kernel's launches."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.planted: set[str] = set()
        self.faults: collections.Counter[str] = collections.Counter()
        self.parts: dict[str, dict[str, Any]] = {}
        self.whole = True
        self.reasons: collections.Counter[str] = collections.Counter()

    @property
    def part(self) -> dict[str, Any]:
        """The numbers of the present test file."""
        name = sanitized.part_of(self.path) if self.path else "collection"
        if name not in self.parts:
            counts = dict.fromkeys(("passed", "skipped", "failed", "launches", "races_unchecked", "faults"), 0)
            self.parts[name] = {"digest": sanitized.digest(name), **counts, "seconds": 0.0, "kernels": {}}
        return self.parts[name]

    # launches ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A ttsem session whose launches and faults are counted here."""
        stock = harness.record_launch

        def record_launch(*arguments: Any, **options: Any) -> Any:
            recorded = stock(*arguments, **options)
            self._launched(recorded.record)
            return recorded

        harness.record_launch = record_launch
        try:
            with session(source="<pytest>", on_stop=self._stopped, on_unchecked=self._unchecked), standins():
                yield
        finally:
            harness.record_launch = stock

    def _launched(self, launch: Any) -> None:
        programs = 1
        for n in launch.grid:
            programs *= int(n)
        folder = launch.fn.fn.__module__.removeprefix("abyssal.").split(".")
        name = f"{folder[0] if folder[1] == 'triton' else folder[1]}.{launch.fn_name}"
        kernel = self.part["kernels"].setdefault(name, {"launches": 0, "least": programs, "most": programs})
        kernel["launches"] += 1
        kernel["least"], kernel["most"] = min(kernel["least"], programs), max(kernel["most"], programs)
        self.part["launches"] += 1

    def _stopped(self, stop: Exception) -> None:
        kind = stop.fault.kind if isinstance(stop, KernelFault) else stop.verdict
        if self.path and self.path.name == "test_planted.py":
            self.planted.add(kind)
        else:
            self.faults[kind] += 1
            self.part["faults"] += 1

    def _unchecked(self) -> None:
        self.part["races_unchecked"] += 1

    # pytest's hooks ---------------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        """The planted faults are not `-k`'s to leave out."""
        planted = [item for item in items if item.path.name == "test_planted.py"]
        items[:] = [item for item in items if item not in planted]
        for item in items:
            reason = next((why for pattern, why in CANNOT.items() if fnmatch.fnmatch(item.nodeid, pattern)), None)
            if reason or item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason or "sizes for a GPU"))
        yield
        items += planted

    def pytest_deselected(self) -> None:
        self.whole = False

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.path = item.path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.path = ROOT / report.location[0]
        self.part["seconds"] += report.duration
        if report.skipped:
            self.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
        if report.when == "call" or not report.passed:
            self.part[report.outcome] += 1
        if report.failed:
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)  # at once: a run takes long

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.whole = self.whole and not session.shouldstop and not session.shouldfail

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("executed by ttsem")
        for line in self.summary():
            terminalreporter.write_line(line)

    # the end ----------------------------------------------------------------------------------------------------------

    def total(self, name: str) -> Any:
        return sum(part[name] for part in self.parts.values())

    def summary(self) -> Iterator[str]:
        yield f"{'part':<16}{'passed':>8}{'skipped':>9}{'failed':>8}{'launches':>10}{'seconds':>9}"
        for name, part in sorted(self.parts.items()):
            numbers = f"{part['passed']:>8}{part['skipped']:>9}{part['failed']:>8}{part['launches']:>10}"
            yield f"{name:<16}{numbers}{part['seconds']:>9.0f}"
        for reason, count in self.reasons.most_common():
            yield f"skipped {count}: {reason}"
        for name, kernel in sorted(self.kernels().items()):
            yield f"{name:<36}{kernel['launches']:>7} launches of {kernel['least']} to {kernel['most']} programs"
        yield f"versions: python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PINS)
        yield (
            f"tests {self.total('passed')} passed, {self.total('skipped')} skipped, {self.total('failed')} failed; "
            f"launches {self.total('launches')}, {self.total('races_unchecked')} too large to check for races; "
            f"faults {self.faults.total()} {dict(self.faults) or ''}; planted faults found: {sorted(self.planted)}; "
            f"{self.total('seconds'):.0f} s"
        )
        yield from (f"NOT PASSED: {problem}" for problem in self.problems())

    def kernels(self) -> dict[str, dict[str, int]]:
        """Launches and programs of the project's kernels, over all parts."""
        found: dict[str, dict[str, int]] = {}
        for part in self.parts.values():
            for name, kernel in part["kernels"].items():
                mine = found.setdefault(name, {**kernel, "launches": 0})
                mine["launches"] += kernel["launches"]
                mine["least"], mine["most"] = min(mine["least"], kernel["least"]), max(mine["most"], kernel["most"])
        return {name: kernel for name, kernel in found.items() if name in sanitized.launched_kernels()}

    def alone(self) -> list[str]:
        """Kernels of the ops whose tests ran whole that no launch of two programs was made of, though one could be."""
        ops = {name.split(".")[0] for name in sanitized.launched_kernels()} & self.parts.keys() if self.whole else ()
        many = {name for name, kernel in self.kernels().items() if kernel["most"] > 1} | sanitized.single_programs()
        return sorted(name for name in sanitized.launched_kernels() - many if name.split(".")[0] in ops)

    def problems(self) -> Iterator[str]:
        """Why the run as a whole must not pass, beside failed tests."""
        if not self.kernels():
            yield "no kernel of the project was launched"
        if self.faults:
            yield f"{self.faults.total()} faults"
        if missed := PLANTED - self.planted:
            yield f"planted and not found: {', '.join(sorted(missed))}"
        if alone := self.alone():
            yield f"never launched with two programs: {', '.join(alone)}"

    def keep(self) -> None:
        """Into the record, the parts that passed whole."""
        record, today = sanitized.load(), datetime.date.today().isoformat()
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        record["versions"] = {"python": platform.python_version(), **{name: version(name) for name in PINS}}
        for name, part in self.parts.items():
            if part["launches"] and not part["failed"] and not part["faults"] and name != "planted":
                made = {"date": today, "commit": head.stdout.strip()}
                record["parts"][name] = {**made, **part, "seconds": round(part["seconds"])}
        sanitized.save(record)


def run(arguments: list[str], keep: bool) -> int:
    """pytest's exit status, or 1 where that is 0 and the run must not pass all the same. Parts that passed are kept on
    record though others did not, but for a run that would not have seen a fault.
    """
    sanitizer = Sanitizer()
    with sanitizer.watching():
        status = int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[sanitizer]))
    problems = list(sanitizer.problems())
    blind = not sanitizer.kernels() or bool(PLANTED - sanitizer.planted)
    if keep and not blind and sanitizer.whole and status in (0, 1) and not any("::" in word for word in arguments):
        sanitizer.keep()
        print(sanitized.describe())
    return status or int(bool(problems))
