"""Tests in processes side by side, each test with a time limit: one that hangs or takes its process down costs nothing
but itself, and what is over is on disk.

    run(files, folder, ...)      the parent: starts workers, ends a test that is over its limit, starts another worker
    python -m pytest -p ...      a worker: claims one test after the other (a file that only one can make), tells of it

    folder/claims/NUMBER     folder/told-WORKER.jsonl     folder/log-WORKER.txt     folder/tests.jsonl, tests.xml

pytest alone is needed: neither xdist nor timeouts of pytest. This file is a plugin of pytest too, and imports no torch.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PACKAGE = Path(__file__).resolve().parents[3]
FOLDER, NUMBER, PARENT = (f"ABYSSAL_WORKERS_{name}" for name in ("FOLDER", "NUMBER", "PARENT"))  # what a worker is told
OUTCOMES = ("passed", "failed", "skipped", "cut", "died", "not begun")
STARTING = 120.0  # seconds within which a worker has collected the tests, or is given up
Result = dict[str, Any]  # "id", "outcome", "seconds", "text"


@dataclass
class Report:
    """What came of the tests; `error` says why none could be run."""

    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""

    def of(self, *outcomes: str) -> list[Result]:
        return [r for r in self.results if r["outcome"] in outcomes]

    def __str__(self) -> str:
        count = Counter(r["outcome"] for r in self.results)
        told = ", ".join(f"{count[o]} {o}" for o in OUTCOMES if count[o]) or "no tests"
        return f"{told} in {self.seconds:.0f} s" + (f"; {self.error}" if self.error else "")


def run(
    files: Sequence[Path],
    folder: Path,
    *,
    root: Path,
    arguments: Sequence[str] = (),
    workers: int = 1,
    limit: float = 120.0,
    seconds: float = 600.0,
    first_failure: bool = False,
    environment: dict[str, str] | None = None,
) -> Report:
    """The tests in `files` that `arguments` of pytest select, with `root` as working directory.

    limit: seconds of a test. seconds: of all; what has not begun then is told as such. first_failure: stop at it.
    """
    return _Pool([*map(str, files), *arguments], folder, root, limit, environment or {}).run(
        workers, time.monotonic() + seconds, first_failure
    )


class _Pool:
    def __init__(
        self, arguments: list[str], folder: Path, root: Path, limit: float, environment: dict[str, str]
    ) -> None:
        self.arguments, self.folder, self.root, self.limit = arguments, folder, root, limit
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, **environment, "PYTHONPATH": path}
        self.environment |= {FOLDER: str(folder.resolve()), PARENT: str(os.getpid())}
        self.started = 0
        self.results: dict[str, Result] = {}
        self.file = (folder / "tests.jsonl").open("a", encoding="utf-8")

    def run(self, workers: int, end: float, first_failure: bool) -> Report:
        """Until every test is told, or `end`."""
        began, running, error = time.monotonic(), [self._start() for _ in range(workers)], ""
        try:
            while running and time.monotonic() < end:
                time.sleep(0.05)
                for worker in list(running):
                    self._read(worker)
                    if worker.process.poll() is None and not worker.over(self.limit):
                        continue
                    running.remove(worker)
                    self._end(worker)
                    if not worker.ready:
                        error = f"a worker ended before its first test: {worker.last_words()}"
                    elif not worker.done:
                        running.append(self._start())
                if first_failure and any(r["outcome"] in ("failed", "died") for r in self.results.values()):
                    break
        finally:
            for worker in running:
                self._end(worker)
        return self._report(time.monotonic() - began, error)

    def _start(self) -> "_Worker":
        self.started += 1
        worker = _Worker(self.started, self.folder)
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", "-q", "-p", __name__, "-p", "no:cacheprovider"]
        command += ["-p", "no:xdist", *self.arguments]
        environment = self.environment | {NUMBER: str(worker.number)}
        with worker.log.open("w", encoding="utf-8") as log:
            worker.process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        return worker

    def _read(self, worker: "_Worker") -> None:
        for told in worker.news():
            if told["what"] == "begin":
                worker.now, worker.since = told["id"], time.monotonic()
            elif told["what"] == "end":
                worker.now, worker.since = "", time.monotonic()
                self._tell(told["id"], told["outcome"], told["seconds"], told["text"])
            else:
                worker.ready, worker.done, worker.since = True, told["what"] == "done", time.monotonic()

    def _end(self, worker: "_Worker") -> None:
        """Tells what became of the worker's test, and gives back what it has claimed beside that."""
        alive = worker.process.poll() is None
        worker.kill()
        self._read(worker)
        seconds = time.monotonic() - worker.since
        if worker.now and alive:
            self._tell(worker.now, "cut", seconds, f"still running after {seconds:.0f} s")
        elif worker.now:
            self._tell(worker.now, "died", seconds, worker.last_words())
        if worker.done or not worker.ready:
            return
        names = self._collected()
        for claim in (self.folder / "claims").iterdir():
            if claim.read_text("utf-8") == str(worker.number) and names[int(claim.name)] not in self.results:
                claim.unlink()

    def _collected(self) -> list[str]:
        path = self.folder / "collected.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else []

    def _tell(self, name: str, outcome: str, seconds: float, text: str) -> None:
        self.results[name] = {"id": name, "outcome": outcome, "seconds": round(seconds, 3), "text": text}
        self.file.write(json.dumps(self.results[name]) + "\n")
        self.file.flush()

    def _report(self, seconds: float, error: str) -> Report:
        for name in self._collected():
            if name not in self.results:
                self._tell(name, "not begun", 0.0, "")
        self.file.close()
        report = Report(list(self.results.values()), seconds, error)
        junit(report, self.folder / "tests.xml")
        return report


class _Worker:
    """A process, and what it has told."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.log, self.told = number, folder / f"log-{number}.txt", folder / f"told-{number}.jsonl"
        self.process: subprocess.Popen[bytes]
        self.ready, self.done, self.now, self.since, self.at = False, False, "", time.monotonic(), 0

    def news(self) -> Iterator[dict[str, Any]]:
        if not self.told.is_file():
            return
        with self.told.open("rb") as file:
            file.seek(self.at)
            for line in file:
                if line.endswith(b"\n"):
                    self.at += len(line)
                    yield json.loads(line)

    def over(self, limit: float) -> bool:
        """It hangs in a test, or between two, or before its first one."""
        return time.monotonic() - self.since > (limit if self.ready else STARTING)

    def kill(self) -> None:
        """With all its children: a compiler, say."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def last_words(self) -> str:
        return "\n".join(self.log.read_text("utf-8", errors="replace").splitlines()[-30:])


def junit(report: Report, path: Path) -> None:
    """The report as other tools read it."""
    suite = ElementTree.Element("testsuite", name="abyssal", tests=str(len(report.results)))
    for result in report.results:
        name = result["id"].partition("::")
        case = ElementTree.SubElement(suite, "testcase", classname=name[0], name=name[2], time=str(result["seconds"]))
        if result["outcome"] != "passed":
            kind = {"failed": "failure", "died": "error", "cut": "error"}.get(result["outcome"], "skipped")
            text = "".join(c for c in result["text"] if c >= " " or c in "\n\t")  # what XML cannot hold
            first = (text.splitlines() or [""])[-1][:300]
            ElementTree.SubElement(case, kind, message=f"{result['outcome']}: {first}").text = text
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


# a worker, inside pytest ---------------------------------------------------------------------------------------------


def pytest_runtestloop(session: Any) -> bool | None:
    """Instead of pytest's own loop: whatever nobody has claimed yet."""
    if FOLDER not in os.environ:
        return None
    if session.testsfailed:  # a file that cannot be collected
        raise session.Interrupted(f"{session.testsfailed} errors during collection")
    folder, worker = Path(os.environ[FOLDER]), _Telling(Path(os.environ[FOLDER]))
    names = folder / f".collected-{os.environ[NUMBER]}"
    names.write_text(json.dumps([item.nodeid for item in session.items]), "utf-8")
    names.replace(folder / "collected.json")
    session.config.pluginmanager.register(worker)
    worker.tell("ready", process=os.getpid())
    threading.Thread(target=end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    item = next_item = None
    for number, candidate in enumerate([*session.items, None]):
        if candidate is not None and not _claim(folder / "claims" / str(number)):
            continue
        item, next_item = next_item, candidate
        if item is not None:
            worker.begin(item)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
            worker.end(item)
    worker.tell("done")
    return True


def _claim(path: Path) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(os.environ[NUMBER])
    except FileExistsError:
        return False
    return True


def end_with(parent: int) -> None:
    """Ends this process after its parent, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Telling:
    """What a worker tells its parent, a line for each thing, at once."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / f"told-{os.environ[NUMBER]}.jsonl").open("a", encoding="utf-8")
        self.reports: list[Any] = []

    def tell(self, what: str, **more: Any) -> None:
        self.file.write(json.dumps({"what": what, **more}) + "\n")
        self.file.flush()

    def begin(self, item: Any) -> None:
        self.reports, self.since = [], time.monotonic()
        self.tell("begin", id=item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.reports.append(report)

    def end(self, item: Any) -> None:
        bad = [r for r in self.reports if r.failed]
        skipped = any(r.skipped for r in self.reports)
        outcome = "failed" if bad else "skipped" if skipped else "passed"
        text = "\n".join(r.longreprtext for r in bad or self.reports)[-8000:]
        self.tell("end", id=item.nodeid, outcome=outcome, seconds=time.monotonic() - self.since, text=text)
        if bad and "CUDA error" in text:  # every test after it would fail in this process
            os._exit(1)
