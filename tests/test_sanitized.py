"""What `python tests/sanitize` last executed on a CPU is what the kernels are now.

A part whose sources changed since is a warning that names the command, not a failure: ttsem needs Python 3.12 and one
version of torch and triton, so that neither CI (Python 3.11) nor a contributor without that Python could make it pass,
and a fix of a kernel must not wait for it. `pytest -W error tests/test_sanitized.py` makes it a failure, for a release.
"""

import contextlib
import importlib
import sys
import warnings
from collections import Counter
from unittest.mock import MagicMock

import pytest
import sanitized


def test_the_present_kernels_were_executed():
    if stale := sanitized.stale():
        what = f"kernels changed since tests/sanitize executed them: {', '.join(stale)}"
        warnings.warn(f"{what}; run python tests/sanitize --stale", stacklevel=1)


def test_what_is_on_record_passed_and_each_kernel_was_launched_with_several_programs():
    record = sanitized.load()["parts"]
    assert all(part["launches"] and part["passed"] and not part["faults"] for part in record.values())
    most: Counter[str] = Counter()
    for part in record.values():
        most |= Counter({name: kernel["most"] for name, kernel in part["kernels"].items()})
    ops = record.keys() - set(sanitized.stale())
    several = sanitized.launched_kernels() - sanitized.single_programs()
    assert not [name for name in several if name.split(".")[0] in ops and most[name] < 2]
    assert "moe_route.scan" in sanitized.single_programs() and "moe_route.place" not in sanitized.single_programs()


def test_a_changed_kernel_makes_its_part_and_the_models_stale(monkeypatch, tmp_path):
    folder = tmp_path / "kernels/pool"
    (folder / "triton").mkdir(parents=True)
    (folder / "triton/__init__.py").write_text("", "utf-8")
    (folder / "eager.py").write_text("", "utf-8")
    monkeypatch.setattr(sanitized, "ROOT", tmp_path)
    monkeypatch.setattr(sanitized, "KERNELS", tmp_path / "kernels")
    before = {part: sanitized.digest(part) for part in ("pool", "models")}
    (folder / "eager.py").write_text("# changed\n", "utf-8")
    assert before == {part: sanitized.digest(part) for part in before}
    (folder / "triton/__init__.py").write_text("# changed\n", "utf-8")
    assert all(sanitized.digest(part) != old for part, old in before.items())


def test_what_was_executed_from_other_sources_is_stale(monkeypatch):
    record = sanitized.load()
    before = sanitized.stale()
    record["parts"]["pool"]["digest"] = "another text"
    monkeypatch.setattr(sanitized, "load", lambda: record)
    assert set(sanitized.stale()) == {"pool", *before}


@pytest.fixture
def plugin(monkeypatch):
    """The sanitizer's verdict, without ttsem; runs record nothing but that they would."""
    for name in ("ttsem", "ttsem.sanitize", "standins"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.syspath_prepend(sanitized.ROOT / "tests/sanitize")
    module = importlib.import_module("plugin")
    monkeypatch.delitem(sys.modules, "plugin")
    monkeypatch.setattr(module.Sanitizer, "watching", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(module.Sanitizer, "keep", lambda self: kept.append(self))
    monkeypatch.setattr(module, "version", lambda name: "0")
    module.kept = kept = []
    return module


@pytest.mark.parametrize(
    ("status", "planted", "faults", "launched", "passes", "keeps"),
    [
        (0, {"race", "oob_write", "oob_read"}, {}, True, True, True),
        (0, {"race", "oob_read"}, {}, True, False, False),
        (0, {"race", "oob_write", "oob_read"}, {}, False, False, False),
        (0, {"race", "oob_write", "oob_read"}, {"race": 1}, True, False, True),
        (1, {"race", "oob_write", "oob_read"}, {}, True, False, True),
        (2, {"race", "oob_write", "oob_read"}, {}, True, False, False),
    ],
)
def test_a_run_that_would_not_see_a_fault_neither_passes_nor_is_kept(
    plugin, monkeypatch, status, planted, faults, launched, passes, keeps
):
    def main(arguments, plugins):
        (sanitizer,) = plugins
        sanitizer.planted |= planted
        sanitizer.faults.update(faults)
        if launched:
            sanitizer.path = sanitized.file_of("pool")
            sanitizer.part["kernels"] |= {
                name: {"launches": 1, "least": 1, "most": 2}
                for name in sanitized.launched_kernels()
                if name.startswith("pool.")
            }
        return status

    monkeypatch.setattr(plugin.pytest, "main", main)
    assert (plugin.run(["pool"], keep=True) == 0) == passes
    assert bool(plugin.kept) == keeps


def test_the_list_of_launched_kernels():
    names = sanitized.launched_kernels()
    assert {"attention.attention_tile", "kernels.sum_lists", "moe_route.count", "newton_schulz.symmetric"} <= names
    assert not any(name.endswith(("._keys", "._tile")) for name in names), "called by kernels alone"
