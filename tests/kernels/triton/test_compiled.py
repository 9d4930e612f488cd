"""Every shipped kernel compiles for every architecture: nothing spilled, within shared memory, wgmma on Hopper.

What has been shown for this version of triton and these sources is on record (tests/support/record.py) and not shown
again, but for a sample; the rest compiles here, in processes of its own.
"""

import importlib
import os
import warnings
from typing import Any

import aot
import pytest
import record
import triton

from abyssal.kernels.triton import launch as triton_launch

SAMPLE = {  # of each op a case that is soon compiled
    "attention": "attention, bf16, h=6 d=40 k=5",
    "cross_entropy": "loss, to bf16, V=129280",
    "engram": "engram, bf16, n=3 d=52 rows of 20",
    "exact_linear": "exact linear, d=70 o=7",
    "hyper": "mHC, bf16, n=1 d=64",
    "index_loss": "loss, bf16, i=4 e=32 k=32 h=4 d=64",
    "index_topk": "top-k, bf16, h=64 d=128 k=512 p=8192, one query",
    "moe_experts": "experts, bf16, d=128 n=64 K=4",
    "moe_route": "route, E=128 K=8",
    "newton_schulz": "newton_schulz, bf16, 128 x 64",
    "norm_rope": "norm and rope, d=21 of 6, fp32",
    "pool": "pool, m=3 D=20 overlap",
    "quant": "e4m3, 1 by 128, bf16",
}
PLANTED = """
import torch

def wide():
    from abyssal.kernels.hyper.triton import launch
    launch.panel = lambda n, width: (width, 1)
    launch.collapse_backward(torch.empty(8, 1024), torch.empty(8, 4, 1024), torch.empty(8, 4))

CASES, PRODUCTS = {"wide panels": (["sm_90"], wide)}, set()
"""


def check(row: dict[str, Any]) -> None:
    """One kernel on one architecture."""
    case = importlib.import_module(f"compiled_{row['op']}")
    product = row["kernel"] in case.PRODUCTS
    atomic = product and row["case"] in getattr(case, "ATOMIC_CASES", ())
    assert row["spilled"] == 0, row
    assert (row["float atomics"] > 0) == atomic, row
    half = "bf16" in row["case"] or "fp16" in row["case"]
    if product:
        by_tensor_cores = half or row["kernel"] in getattr(case, "TF32X3", ())
        assert bool(row["mma"]) == by_tensor_cores, f"half precision by tensor cores, float32 exactly: {row}"
        if row["target"] == "sm_90" and half:
            case.check_hopper(row)


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_80", "sm_89", "sm_100", "sm_120", "gfx942"]], ids="-".join)
@pytest.mark.parametrize("op", aot.OPS)
def test_shipped_kernels(op, targets):
    rows = record.fresh(op) or aot.compiled("--only", op, *targets)["rows"]
    rows = [row for row in rows if row["target"] in targets]
    case = importlib.import_module(f"compiled_{op}")
    for target in {target for where, _ in case.CASES.values() for target in where} & set(targets):
        assert {row["kernel"] for row in rows if row["target"] == target} >= case.PRODUCTS
    for row in rows:
        check(row)


@pytest.mark.slow("a kernel of each op is compiled")
def test_record_is_what_compiling_shows():
    """A case of each op on sm_90, whose kernels may be on record for a case that came before it."""
    known = {op: rows for op in aot.OPS if (rows := record.fresh(op))}
    if not known:
        pytest.skip("nothing is on record: everything is compiled")
    arguments = [x for op in known for x in ("--only", op, "--case", SAMPLE[op])]
    found = aot.compiled(*arguments, "sm_90")["rows"]
    assert {row["op"] for row in found} == set(known)
    for row in found:
        assert any(row == other | {"case": row["case"]} for other in known[row["op"]]), row


@pytest.mark.parametrize("op", aot.OPS)
def test_a_changed_source_makes_the_record_stale(op):
    for entry in record.load().get(op, {}).values():
        sources = entry["sources"]
        assert {f"tests/support/compiled_{op}.py", "tests/support/dryrun.py", "kernels/triton/launch.py"} <= set(
            sources
        )
        assert record.holds(entry, sources.get)
        for changed in sources:
            assert not record.holds(entry, {**sources, changed: "another text"}.get)


def test_the_record_of_other_tritons_is_of_the_present_kernels():
    """A warning alone: a fix of a kernel must not wait for them."""
    stale = [f"{op} ({v})" for op, found in record.load().items() for v, x in found.items() if not record.holds(x)]
    if stale:
        warnings.warn(f"kernels changed since they were compiled: {', '.join(stale)}; see BENCHMARKS.md", stacklevel=1)


def test_only_what_was_compiled_from_these_sources_by_this_triton_stands_for_compiling(monkeypatch):
    def entry(**changed):
        found = {"sources": {"kernels/triton/launch.py": aot.digest("kernels/triton/launch.py"), **changed}}
        return {**found, "rows": {"case": {"sm_90": [["kernel", 4, 9, 0, 0, None, 0, 0, 0, 0]]}}}

    for known, rows in (
        ({triton.__version__: entry()}, 1),
        ({triton.__version__: entry(**{"kernels/triton/scatter.py": "another text"})}, 0),
        ({"0.0": entry()}, 0),
    ):
        monkeypatch.setattr(record, "load", lambda known=known: {"op": known})
        assert len(record.fresh("op")) == rows


def test_what_is_filed_is_what_was_found(monkeypatch, tmp_path):
    numbers = dict(zip(record.NUMBERS, range(11, 11 + len(record.NUMBERS))))
    found = [
        {"op": "cross_entropy", "target": target, "case": "c", "kernel": "k", **numbers}
        for target in ("sm_80", "sm_90")
    ]
    monkeypatch.setattr(aot, "compiled", lambda *_: {"rows": found, "sources": {}})
    monkeypatch.setattr(record, "PATH", tmp_path / "compiled.json")
    record.add("cross_entropy")
    assert record.rows("cross_entropy", record.load()["cross_entropy"][triton.__version__]) == found


def test_registers_that_programs_leave_to_each_other(monkeypatch):
    for options, most in (((4,), 255), ((16,), 128), ((4, 4), 128)):
        assert triton_launch.registers(*options) == {"num_warps": options[0], "maxnreg": most}
    monkeypatch.setattr(triton_launch, "architecture", lambda: "hip")
    assert triton_launch.registers(4) == {"num_warps": 4}


def test_a_spill_is_seen(tmp_path, monkeypatch):
    """Of panels that one warp cannot hold in its registers."""
    (tmp_path / "compiled_planted.py").write_text(PLANTED, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (row,) = aot.compiled("--only", "planted", "sm_90")["rows"]
    assert row["spilled"] > 0
    with pytest.raises(AssertionError):
        check(row)
