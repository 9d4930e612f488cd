"""Kills a save of a checkpoint folder, at each of its steps and at random moments: is what is there whole afterwards?

    python tests/support/saves.py --kills 200

Each attempt is a fork of this process that saves over a folder of other weights, in other shards and with a file of
another kind, or to a place where nothing is; SIGKILL takes it before its n-th step (what Python reports to audit hooks:
files opened, folders made, renames, removals) or after a random time. Then the place holds, byte for byte, what it held
before or what the save wrote, and the next save leaves nothing of the dead one.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from abyssal.model.interchange import place  # noqa: E402
from abyssal.model.interchange.files import write  # noqa: E402

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


def killed(run: Callable[[], None], step: int | None = None, lifetime: float | None = None) -> bool:
    """Runs in a fork that is killed before its step of that number, or after a time; False if it had ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if step is not None:
                left = [step]

                def count(event: str, arguments: tuple) -> None:
                    if event.startswith(STEPS) and event != "os.kill":
                        left[0] -= 1
                        if left[0] < 0:
                            os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(count)
            run()
            status = 0
        finally:
            os._exit(status)
    if lifetime is not None:
        time.sleep(lifetime)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the save ended with an error")
    return os.WIFSIGNALED(status)


def attempt(parent: Path, over: bool, **when) -> tuple[bool, str]:
    """One save that is killed: whether it was, and what is there then, "old" or "new". Raises where it is neither."""
    folder = parent / "x"
    if over:
        save(folder, 1, 3)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "tokenizer.json").write_text("{}", "utf-8")
    before = contents(folder)
    save(parent / "y", 2, 2)
    after = {**(contents(parent / "y") or {}), **({"sub/tokenizer.json": b"{}"} if over else {})}
    was = killed(lambda: save(folder, 2, 2), **when)
    if not folder.exists():
        place.tidy(folder)  # as a load does
    now = contents(folder)
    if now not in (before, after):
        raise AssertionError(f"killed at {when}: {sorted(now or ())} is neither what was there nor what was written")
    save(folder, 2, 2)
    if contents(folder) != after or {path.name for path in parent.iterdir()} != {"x", "y"}:
        raise AssertionError(f"killed at {when}: the next save leaves {sorted(path.name for path in parent.iterdir())}")
    return was, "old" if now == before else "new"


def every_step(parent: Path, over: bool) -> Counter[str]:
    """What was there after a kill before each step of a save, counted."""
    found: Counter[str] = Counter()
    while True:
        folder = parent / str(found.total())
        folder.mkdir()
        was, state = attempt(folder, over, step=found.total())
        if not was:
            return found
        found[state] += 1


def at_random(parent: Path, kills: int, seed: int) -> Counter[str]:
    draw = random.Random(seed)
    began = time.monotonic()
    killed(lambda: save(parent / "clock", 1, 3))
    took = time.monotonic() - began
    found: Counter[str] = Counter()
    tried = 0
    while found.total() < kills:
        folder, tried = parent / f"r{tried}", tried + 1
        folder.mkdir()
        was, state = attempt(folder, draw.random() < 2 / 3, lifetime=draw.uniform(0, took))
        found[state] += was
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="at random moments (int, default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (int, default: 0)")
    parser.add_argument("--renames", action="store_true", help="as where no folders can be exchanged (default: off)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.renames:
        place._swap = lambda one, other: False
    with tempfile.TemporaryDirectory() as folder:
        found = {f"steps, over {over}": every_step(Path(tempfile.mkdtemp(dir=folder)), over) for over in (True, False)}
        print(json.dumps({**found, "random": at_random(Path(folder), options.kills, options.seed)}, indent=1))


if __name__ == "__main__":
    main()
