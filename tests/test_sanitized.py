"""What `python tests/sanitize` last executed on a CPU is what the kernels are now.

A part whose sources changed since is a warning that names the command, not a failure: ttsem needs Python 3.12 and one
version of torch and triton, so that neither CI (Python 3.11) nor a contributor without that Python could make it pass,
and a fix of a kernel must not wait for it. `pytest -W error tests/test_sanitized.py` makes it a failure, for a release.
"""

import warnings

import sanitized


def test_the_present_kernels_were_executed():
    if stale := sanitized.stale():
        warnings.warn(
            f"kernels changed since they were executed: {', '.join(stale)}; python tests/sanitize --stale", stacklevel=1
        )


def test_every_launched_kernel_was_executed_by_several_programs_without_a_fault():
    """Of the kernels there were: one that is newer is among the changes above."""
    parts = sanitized.load()["parts"]
    assert all(part["launches"] and part["passed"] and not part["faults"] for part in parts.values())
    assert set(parts) == {
        "models",
        "scatter",
        "operators",
        *(path.parent.name for path in sanitized.KERNELS.glob("*/triton.py")),
    }
    kernels = {name: kernel["most"] for part in parts.values() for name, kernel in part["kernels"].items()}
    fresh = sanitized.launched_kernels() if not sanitized.stale() else sanitized.launched_kernels() & kernels.keys()
    assert all(kernels[name] > 1 for name in fresh)


def test_a_changed_kernel_makes_its_part_and_the_models_stale(monkeypatch, tmp_path):
    folder = tmp_path / "kernels/pool"
    folder.mkdir(parents=True)
    (folder / "triton.py").write_text("")
    (folder / "reference.py").write_text("")
    monkeypatch.setattr(sanitized, "ROOT", tmp_path)
    monkeypatch.setattr(sanitized, "KERNELS", tmp_path / "kernels")
    before = {part: sanitized.digest(part) for part in ("pool", "models")}
    (folder / "reference.py").write_text("# changed\n")
    assert before == {part: sanitized.digest(part) for part in before}
    (folder / "triton.py").write_text("# changed\n")
    assert all(sanitized.digest(part) != old for part, old in before.items())


def test_the_list_of_launched_kernels():
    names = sanitized.launched_kernels()
    assert {"attention.attention_forward", "kernels.sum_lists", "moe_route._count", "newton_schulz.symmetric"} <= names
    assert not any(name.endswith(("._keys", "._tile")) for name in names), "called by kernels alone"
