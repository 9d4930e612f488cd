"""The README's Python runs as it stands there, and the files that pages name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "kernels/BENCHMARKS.md", "train/RESULTS.md"]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:kernels|model|hf|train|examples|tests|configs)/[\w./*<>-]+)`")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_python_to_run():
    assert BLOCKS


SOURCES = sorted(
    path for top in ("kernels", "model", "hf", "train", "examples", "tests") for path in (ROOT / top).rglob("*.py")
)


def test_files_named_in_sources_are_there():
    named = {(str(path.relative_to(ROOT)), name) for path in SOURCES for name in FILE.findall(path.read_text("utf-8"))}
    assert not [(where, name) for where, name in named if "<" not in name and not list(ROOT.glob(name))]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_are_there(page):
    named = set(FILE.findall((ROOT / page).read_text("utf-8")))
    named |= set(re.findall(r"\]\((?!https?:)([\w./-]+)", (ROOT / page).read_text("utf-8")))
    here = (ROOT, (ROOT / page).parent)
    lost = [name for name in named if "<" not in name and not any(list(folder.glob(name)) for folder in here)]
    assert not lost
