"""Every shipped kernel compiles for every architecture: no spilled registers, within shared memory, wgmma on Hopper.

In processes of their own, as the interpreter's functions cannot be compiled; the first time takes about a minute, later
ones come from triton's cache.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
OPS = sorted(path.stem.removeprefix("compiled_") for path in SUPPORT.glob("compiled_*.py"))


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_80", "sm_86", "sm_100", "gfx942"]], ids="-".join)
@pytest.mark.parametrize("op", OPS)
def test_shipped_kernels(op, targets):
    case = importlib.import_module(f"compiled_{op}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SUPPORT / "aot.py", "--json", "--only", op, *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]  # also where a kernel needs more shared memory than there is
    rows = json.loads(done.stdout.splitlines()[-1])
    for target in {target for where, _ in case.CASES.values() for target in where} & set(targets):
        assert {row["kernel"] for row in rows if row["target"] == target} >= case.PRODUCTS
    for row in rows:
        atomic = row["case"] in getattr(case, "ATOMIC_CASES", ()) and row["kernel"] in case.PRODUCTS
        assert row["spilled"] == 0 and (row["float atomics"] > 0) == atomic, row
        half = "bf16" in row["case"] or "fp16" in row["case"]
        if row["kernel"] in case.PRODUCTS:
            by_tensor_cores = half or row["kernel"] in getattr(case, "TF32X3", ())
            assert bool(row["mma"]) == by_tensor_cores, f"half precision by tensor cores, float32 exactly: {row}"
            if row["target"] == "sm_90" and half:
                case.check_hopper(row)
