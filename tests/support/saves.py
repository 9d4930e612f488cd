"""Kills a save of a checkpoint folder at each of its steps: is what is there whole afterwards?

Each attempt is a fork of this process that saves over a folder of other weights, in other shards and with a file of
another kind, or to a place where nothing is; SIGKILL takes it before its n-th step (what Python reports to audit hooks:
files opened, folders made, renames, removals). Then the place holds, byte for byte, what it held before or what the
save wrote, and the next save leaves nothing of the dead one. (`kills.py` kills at random moments.)
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from abyssal.model.interchange import place
from abyssal.model.interchange.files import write

STEPS = ("open", "os.", "shutil.", "tempfile.", "fcntl.")  # of the names of audit events
Files = dict[str, bytes] | None


def save(folder: Path, seed: int, shards: int, size: int = 50) -> None:
    torch.manual_seed(seed)
    names = [[f"{shard}.{i}" for i in range(2)] for shard in range(shards)]

    def make(name: str) -> dict[str, Tensor]:
        return {name: torch.rand(size)}

    write(folder, {"seed": seed}, names, make)


def contents(folder: Path) -> Files:
    """All files in a folder; None where there is none."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed(run: Callable[[], None], step: int) -> bool:
    """Runs in a fork that is killed before its step of that number; False if it had ended."""
    child = os.fork()
    if child == 0:
        left, status = [step], 1

        def count(event: str, arguments: tuple) -> None:
            if event.startswith(STEPS) and event != "os.kill":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            run()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the save ended with an error")
    return os.WIFSIGNALED(status)


def attempt(parent: Path, over: bool, step: int) -> tuple[bool, str]:
    """One save that is killed: whether it was, and what is there then, "old" or "new". Raises where it is neither."""
    folder = parent / "x"
    if over:
        save(folder, 1, 3)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "tokenizer.json").write_text("{}", "utf-8")
    before = contents(folder)
    save(parent / "y", 2, 2)
    after = {**(contents(parent / "y") or {}), **({"sub/tokenizer.json": b"{}"} if over else {})}
    was = killed(lambda: save(folder, 2, 2), step)
    if not folder.exists():
        place.tidy(folder)  # as a load does
    now = contents(folder)
    if now not in (before, after):
        raise AssertionError(f"step {step}: {sorted(now or ())} is neither the old nor the new")
    save(folder, 2, 2)
    there = {path.name for path in parent.iterdir()}
    if contents(folder) != after or there != {"x", "y"}:
        raise AssertionError(f"step {step}: the next save leaves {sorted(there)}")
    return was, "old" if now == before else "new"


def every_step(parent: Path, over: bool) -> Counter[str]:
    """What was there after a kill before each step of a save, counted."""
    found: Counter[str] = Counter()
    while True:
        folder = parent / str(found.total())
        folder.mkdir()
        was, state = attempt(folder, over, found.total())
        if not was:
            return found
        found[state] += 1
