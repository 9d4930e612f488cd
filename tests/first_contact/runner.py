"""Parts, each a process of its own with a time limit, in order of importance, within one budget.

A part writes lines to OUT/NAME.jsonl as it goes, {"begin": ITEM} before what may hang or crash; a part that hangs or
dies in an item is started again for the items after it. OUT/parts.json says what became of each part.
"""

import faulthandler
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, and CUDA first touched in a part
PRELOADED = ["torch", "abyssal.model", "abyssal.train.measure.bench.run", "abyssal.train.measure.profile.run"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a part knows: where it writes, where it computes, and when its time is up."""

    name: str
    out: Path
    device: str  # "cuda" or "cpu", where sizes are small
    end: float  # by time.time()

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def left(self) -> float:
        return self.end - time.time()

    def tell(self, **row: Any) -> None:
        """A line of the part's file, at once."""
        with journal(self.out, self.name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def items(self, names: Sequence[str]) -> Iterator[str]:
        """Those that no earlier start of this part has begun."""
        begun = {row["begin"] for row in rows(self.out, self.name) if "begin" in row}
        for name in names:
            if name not in begun:
                self.tell(begin=name)
                yield name


@dataclass(frozen=True)
class Part:
    """`seconds` of the default budget that it may take; with less than `least` it is not begun."""

    name: str
    run: Callable[[Context], None]
    seconds: float
    least: float = 5.0
    item: float = 60.0  # seconds that an item may take

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").split("\n")[0]


def journal(out: Path, name: str) -> Path:
    return out / f"{name}.jsonl"


def rows(out: Path, name: str) -> list[Row]:
    """What a part has told."""
    return lines(journal(out, name))


def lines(path: Path) -> list[Row]:
    """Of a file with one JSON object in each, without one that was cut off."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def run_all(parts: Sequence[Part], out: Path, device: str, seconds: float, say: Callable[[str], None]) -> list[Row]:
    """Every part with its share of what is left, the least that it needs if that is more; the rest of a part that ends
    early falls to those behind it.
    """
    end, told = time.time() + seconds, []
    for number, part in enumerate(parts):
        left, wanted = end - time.time(), sum(p.seconds for p in parts[number:])
        limit = left * part.seconds / wanted if wanted > left else min(left, part.seconds + (left - wanted))
        limit = max(limit, min(part.least, left))  # of a small budget the first parts get enough, the last ones nothing
        if limit < part.least:
            row = {"part": part.name, "status": "skipped", "seconds": 0.0, "note": f"{limit:.0f} s were left for it"}
        else:
            say(f"{part.name}: {part.about} (at most {limit:.0f} s)")
            note = "all was ended before it was over"
            _record(out, [*told, {"part": part.name, "status": "cut", "seconds": 0.0, "note": note}])
            row = run_part(part, out, device, limit)
        told.append(row)
        _record(out, told)
        say(f"{part.name}: {row['status']} after {row['seconds']:.0f} s{row['note'] and ': ' + row['note']}")
    return told


def _record(out: Path, told: list[Row]) -> None:
    """Written anew and renamed: whoever kills us leaves a whole file."""
    new = out / ".parts.json"
    new.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    new.replace(out / "parts.json")


def run_part(part: Part, out: Path, device: str, limit: float) -> Row:
    """Its process, again while it dies in an item and more are to come; "ok", "cut" or "died", and why."""
    began, end, notes, status = time.time(), time.time() + limit, [], "died"
    while True:
        items = _begun(out, part.name)
        code, lingered = _process(part, out, device, end)
        status = "ok" if code == 0 else "cut" if code is None else "died"
        if status == "ok" or time.time() + part.least > end:
            break
        last = (_begun(out, part.name) or [""])[-1]
        notes.append(f"{f'{last}: ' if last else ''}{'hung' if lingered else 'died'}, {_last_words(out, part.name)}")
        if len(_begun(out, part.name)) == len(items):  # it comes no further
            break
    if notes:
        status = "died" if status != "cut" else status
    return {"part": part.name, "status": status, "seconds": time.time() - began, "note": "; ".join(notes)[:500]}


def _begun(out: Path, name: str) -> list[str]:
    return [row["begin"] for row in rows(out, name) if "begin" in row]


def _process(part: Part, out: Path, device: str, end: float) -> tuple[int | None, bool]:
    """Exit status, None if it was ended from here; and whether an item hung."""
    process = PROCESSES.Process(target=_within, args=(part, Context(part.name, out, device, end)))
    process.start()
    size, since = -1, time.time()
    try:
        while process.is_alive():
            process.join(0.05)
            now = journal(out, part.name).stat().st_size if journal(out, part.name).is_file() else 0
            size, since = (now, time.time()) if now != size else (size, since)
            hangs = time.time() - since > part.item
            if process.is_alive() and (hangs or time.time() > end):
                return None, hangs
        return process.exitcode, False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def _within(part: Part, at: Context) -> None:
    """In its own process and session: what it says goes to its log."""
    os.setsid()
    threading.Thread(target=_end_with_main, daemon=True).start()
    log = os.open(at.out / f"{at.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable()
    part.run(at)


def _end_with_main() -> None:
    """Ends this session after the process that began the parts. Our parent, the fork server, lives as long as we do."""
    if main := multiprocessing.parent_process():
        main.join()
        os.killpg(0, signal.SIGKILL)


def _last_words(out: Path, name: str) -> str:
    said = (out / f"{name}.log").read_text("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(said) if line.strip()), "without a word")[:200]
