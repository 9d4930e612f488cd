"""`tests/matrix`, but for what it installs: what a row is told, and what of its result is said."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("matrix") / "__main__.py"


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("matrix_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{module.MARKS[0]}old\n{module.MARKS[1]}\nafter\n", "utf-8")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    return module


def test_nothing_of_the_callers_settings_reaches_a_row(matrix, monkeypatch):
    for name in ("PIP_CONFIG_FILE", "UV_CACHE", "PYTEST_ADDOPTS", "OPENBLAS_CORETYPE", "GIT_DIR", "PYTHONPATH"):
        monkeypatch.setenv(name, "theirs")
    assert "theirs" not in matrix.environment("", "here").values()
    found = matrix.environment("Zen", "here")
    assert found["OPENBLAS_CORETYPE"] == "Zen" and found["TRITON_CACHE_DIR"] == "here/triton" and "PATH" in found


@pytest.mark.parametrize(
    ("said", "failed", "passed"),
    [
        ("....\n90 passed, 3 skipped in 5.01s\n", 0, 90),
        ("F\n2 failed, 88 passed, 3 errors in 5.01s\n", 5, 88),
        ("1 error in 0.10s", 1, 0),
        ("", 0, 0),
    ],
)
def test_errors_are_failures_and_the_status_is_told(matrix, monkeypatch, said, failed, passed):

    def run(command, **options):
        return subprocess.CompletedProcess(command, int(bool(failed)) if said else -4, said)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "abc1234\n")
    monkeypatch.setattr(matrix, "ROWS", [matrix.Row("3.12", "2.13.0", None)])
    (name,) = (row.name for row in matrix.ROWS)
    monkeypatch.setattr(matrix.shutil, "which", lambda name: name)
    assert matrix.main([]) == (1 if failed else 0 if said else 4)
    line = json.loads(matrix.RESULTS.read_text("utf-8"))[name]
    assert (line["failed"], line["passed"], line["commit"], line["triton"]) == (failed, passed, "abc1234", "none")
    table = matrix.PAGE.read_text("utf-8")
    assert table.startswith("before\n") and table.endswith("\nafter\n") and "old" not in table
    assert f"| {passed} | {failed} |" in table
    if not said:
        assert "| -4 |" in table, "died before it could count"


def test_a_row_that_cannot_be_installed_leaves_the_others(matrix, monkeypatch, capsys):
    def run(row, arguments):
        if row.triton is None:
            raise subprocess.CalledProcessError(2, ["uv", "pip", "install"])
        return {"exit": 0}

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix, "record", lambda name, line: recorded.append(name))
    monkeypatch.setattr(matrix.shutil, "which", lambda name: name)
    recorded = []
    names = [row.name for row in matrix.ROWS]
    assert matrix.main([]) == 1 and "not run: " in capsys.readouterr().err
    assert recorded == [name for name in names if not name.endswith("without-triton")]
    with pytest.raises(SystemExit):
        matrix.main(["3.9-torch1.0"])
