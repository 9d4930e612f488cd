"""Compiled kernels executed on a CPU, with faults for what a GPU forgives: `python tests/sanitize`.

    python tests/sanitize                     the kernel tests and the whole-model passes
    python tests/sanitize hyper -k gradient   those of one op (or `models`), with any pytest arguments
    python tests/sanitize --stale             those whose kernels changed since they last ran here

ttsem (a package of the public index) compiles every launch to Triton's own IR for sm_90 and executes that: accesses out
of bounds, races between programs and undefined values fail the test at the kernel's line, and memory that nobody wrote
is NaN. It goes with one version of torch and of triton, so this makes an environment of its own, once, with pip as pip
is set up (`PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` fetches the build without CUDA, a tenth of the
size). The exit status is 0 only if tests passed, kernels were launched, none had a fault, and the planted faults were
found. `record.json` keeps which parts passed, from which sources.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PINS = {"torch": "2.14.0", "triton": "3.8.0", "ttsem": "0.1.0"}
PYTHONS = ((3, 12), (3, 13))


def main() -> int:
    parser = argparse.ArgumentParser(
        "python tests/sanitize", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="use the present environment, which holds the versions")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-sanitize", help="where its own one is kept")
    parser.add_argument("--stale", action="store_true", help="run what the record does not cover any more")
    parser.add_argument("--no-record", action="store_true", help="leave record.json as it is")
    parser.add_argument("-k", metavar="EXPRESSION", help="as pytest's; the planted faults stay")
    options, rest = parser.parse_known_args()
    sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "tests/support")]
    import sanitized

    if options.stale and not (rest := [*rest, *sanitized.stale()]):
        print(sanitized.describe())
        return 0
    if not options.here:
        python = environment(options.environment)
        return subprocess.run([python, HERE, "--here", *sys.argv[1:]], cwd=ROOT).returncode
    if sys.version_info[:2] not in PYTHONS:
        print(f"--here: Python {platform.python_version()}; ttsem needs 3.12 or 3.13", file=sys.stderr)
        return 2
    if missing := [f"{name}=={pin}" for name, pin in PINS.items() if installed(name) != pin]:
        print(f"--here: this environment lacks {', '.join(missing)}; without --here one is made", file=sys.stderr)
        return 2
    return execute(options, rest)


def installed(name: str) -> str | None:
    """The version without its local part: 2.14.0+cpu is 2.14.0."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with the pinned versions and what the tests import, made if need be."""
    done, python = folder / "complete", folder / "bin/python"
    needs = [f"{name}=={pin}" for name, pin in PINS.items()] + ["pytest>=8"]
    needs += tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    if not done.exists() or done.read_text("utf-8") != "\n".join(needs):
        print(f"making {folder}: {', '.join(needs)}", flush=True)
        subprocess.run([python_for_it(), "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], check=True)
        done.write_text("\n".join(needs), "utf-8")
    return python


def python_for_it() -> str:
    """This Python, or one on the path."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    for major, minor in PYTHONS:  # a name on the path may be a shim that leads nowhere
        found = shutil.which(f"python{major}.{minor}")
        if found and not subprocess.run([found, "--version"], capture_output=True).returncode:
            return found
    sys.exit("tests/sanitize needs Python 3.12 or 3.13, as ttsem does; `uv venv --python 3.12`, for one, gets it")


def execute(options: argparse.Namespace, rest: list[str]) -> int:
    """In this process: the tests named, or all, and always the planted faults."""
    os.chdir(ROOT)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    import plugin
    import sanitized

    named = {word: sanitized.file_of(word) for word in rest}
    arguments = [str(path) if path.exists() else word for word, path in named.items()]
    if not any(Path(word.partition("::")[0]).exists() for word in arguments):
        arguments += [str(sanitized.TESTS), str(HERE)]
    arguments += ["-k", options.k] if options.k else []
    return plugin.run([*arguments, str(HERE / "test_planted.py")], not options.no_record)


if __name__ == "__main__":
    sys.exit(main())
