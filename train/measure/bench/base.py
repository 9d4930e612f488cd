"""The kernels of another commit, imported beside the present ones: `abyssal bench OP --base REF`.

Its kernels/ is taken out of git into a temporary folder, as a package of another name whose operators have another
namespace, so that both commits run in one process, in turn, on the same inputs.
"""

import importlib
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
_number = itertools.count()


@contextmanager
def kernels_at(ref: str) -> Iterator[tuple[ModuleType, str]]:
    """The package `kernels` as it was at the commit `ref`, and that commit's full name.

    Raises:
        ValueError: this is no git checkout, or `ref` names no commit that has kernels.
    """
    if not (ROOT / ".git").exists():
        raise ValueError(f"base {ref!r}: the package does not lie in a git checkout, where alone there are commits")
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").decode().strip()
    archive = commit and _git("archive", commit, "kernels")
    if not archive:
        raise ValueError(f"base {ref!r}: allowed is what git knows as a commit with kernels, as in HEAD~1")
    name = f"abyssal_{commit[:12]}_{next(_number)}"
    with tempfile.TemporaryDirectory() as folder:
        _unpack(archive, Path(folder) / name)
        sys.path.append(folder)
        try:
            yield importlib.import_module(f"{name}.kernels"), commit
        finally:
            sys.path.remove(folder)
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[module]


def _unpack(archive: bytes, package: Path) -> None:
    """Into a package whose operators are called after it."""
    package.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(package, filter="data")
    (package / "__init__.py").touch()
    for path in package.rglob("*.py"):
        text = path.read_text("utf-8")
        renamed = text.replace("abyssal::", f"{package.name}::").replace("ops.abyssal.", f"ops.{package.name}.")
        path.write_text(renamed, "utf-8")


def _git(*arguments: str) -> bytes:
    """Git's answer, empty where it refuses or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
