"""What `python tests/sanitize` last executed on a CPU is what the kernels are now.

A part whose sources changed since is a warning that names the command, not a failure: ttsem needs Python 3.12 and one
version of torch and triton, so that neither CI (Python 3.11) nor a contributor without that Python could make it pass,
and a fix of a kernel must not wait for it. `pytest -W error tests/test_sanitized.py` makes it a failure, for a release.
"""

import warnings
from collections import Counter

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
    assert not [name for name in sanitized.launched_kernels() if name.split(".")[0] in ops and most[name] < 2]


def test_a_changed_kernel_makes_its_part_and_the_models_stale(monkeypatch, tmp_path):
    folder = tmp_path / "kernels/pool"
    folder.mkdir(parents=True)
    (folder / "triton.py").write_text("", "utf-8")
    (folder / "reference.py").write_text("", "utf-8")
    monkeypatch.setattr(sanitized, "ROOT", tmp_path)
    monkeypatch.setattr(sanitized, "KERNELS", tmp_path / "kernels")
    before = {part: sanitized.digest(part) for part in ("pool", "models")}
    (folder / "reference.py").write_text("# changed\n", "utf-8")
    assert before == {part: sanitized.digest(part) for part in before}
    (folder / "triton.py").write_text("# changed\n", "utf-8")
    assert all(sanitized.digest(part) != old for part, old in before.items())


def test_the_list_of_launched_kernels():
    names = sanitized.launched_kernels()
    assert {"attention.attention_forward", "kernels.sum_lists", "moe_route._count", "newton_schulz.symmetric"} <= names
    assert not any(name.endswith(("._keys", "._tile")) for name in names), "called by kernels alone"
