"""Tests side by side: each has its time, and one that hangs or dies takes nobody along."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from abyssal.train.measure.bench import checks, workers

HANGS = """
import os, time, pytest

@pytest.fixture(scope="module")
def once():
    with open("made", "a") as file:
        file.write("x")

@pytest.mark.parametrize("i", range(4))
def test_passes(i, once): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("no reason")
def test_hangs(): time.sleep(600)
def test_dies(): os._exit(7)
def test_says_farewell(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
@pytest.mark.parametrize("i", range(3))
def test_comes_last(i): pass
"""


@pytest.fixture
def tests(tmp_path):
    (tmp_path / "test_it.py").write_text(HANGS, "utf-8")
    return tmp_path


def run(tests, **options):
    out = tests / "out"
    return workers.run([tests / "test_it.py"], out, root=tests, **{"limit": 4, "seconds": 60, **options}), out


@pytest.mark.parametrize("count", [1, 2])
def test_each_test_is_told_once(tests, count):
    report, out = run(tests, workers=count)
    told = {r["id"].partition("::")[2]: r["outcome"] for r in report.results}
    fates = {"test_fails": "failed", "test_skips": "skipped", "test_hangs": "cut", "test_dies": "died"}
    assert {name: outcome for name, outcome in told.items() if outcome != "passed"} == fates | {
        "test_says_farewell": "failed"
    }
    assert len(report.results) == len(told) == 12 and not report.error
    assert str(report).startswith("7 passed, 2 failed, 1 skipped, 1 cut, 1 died in ")
    lines = (out / "tests.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == report.results
    cases = ElementTree.parse(out / "tests.xml").getroot()
    assert {case.get("name"): [x.tag for x in case] for case in cases}["test_hangs"] == ["error"]
    assert "assert 1 == 2" in next(x.text for x in cases.iter("failure"))
    assert len((tests / "made").read_text()) <= count  # a fixture of a module lives on between its tests


def test_time_for_all(tests):
    report, _ = run(tests, seconds=4, limit=100, workers=1, arguments=["-k", "hangs or last"])
    assert [r["outcome"] for r in report.results] == ["cut", "not begun", "not begun", "not begun"]


def test_nothing_to_run_is_said(tests):
    report, _ = run(tests, arguments=["no_such_file.py"])
    assert not report.results and "no_such_file.py" in report.error


def test_workers_end_with_whoever_started_them(tests):
    code = (
        "import sys; from pathlib import Path; from abyssal.train.measure.bench import workers;"
        "workers.run([Path('test_it.py')], Path('out'), root=Path('.'), arguments=['-k', 'hangs'])"
    )
    path = os.pathsep.join([str(workers.PACKAGE), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tests, env={**os.environ, "PYTHONPATH": path})
    told = tests / "out/told-1.jsonl"
    wait(lambda: told.is_file() and "begin" in told.read_text())
    worker = int(json.loads(told.read_text().splitlines()[0])["process"])
    parent.kill()
    parent.wait()
    wait(lambda: not Path(f"/proc/{worker}").exists() or "(zombie)" in Path(f"/proc/{worker}/status").read_text())


def wait(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_op_is_timed_without_what_was_cut(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    slow = "import time\ndef test_slow(): time.sleep(600)\ndef test_it(): pass\n"
    (folder / "test_slow.py").write_text(slow, "utf-8")
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "LIMIT", 2.0)
    said = checks.check("slow", "cpu")
    assert said.startswith("1 passed, 1 cut in ") and said.endswith("; cut: test_slow")
