"""Every shipped kernel compiles for every architecture: no spilled registers, within shared memory, wgmma on Hopper.

In processes of their own, as the interpreter's functions cannot be compiled; the first time takes about a minute, later
ones come from triton's cache.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).parents[2] / "support/aot.py"
PRODUCTS = {"grouped_swiglu", "grouped_swiglu_backward", "grouped", "grouped_outer"}


@pytest.mark.parametrize("targets", [["sm_90"], ["sm_80", "sm_86", "sm_100", "gfx942"]], ids="-".join)
def test_shipped_kernels(targets):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, AOT, "--json", *targets], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]  # also where a kernel needs more shared memory than there is
    rows = json.loads(done.stdout.splitlines()[-1])
    for target in targets:
        assert {row["kernel"] for row in rows if row["target"] == target} >= PRODUCTS
    for row in rows:
        assert row["spilled"] == 0 and row["float atomics"] == 0, row
        half = "bf16" in row["case"] or "fp16" in row["case"]
        if row["kernel"] in PRODUCTS:
            assert bool(row["mma"]) == half, f"half precision by tensor cores, float32 exactly: {row}"
            if row["target"] == "sm_90" and half:
                assert row["hgmma"] > 0, row
                aligned = "d=52" not in row["case"]
                assert (row["tma"] > 0) == (aligned and row["kernel"] != "grouped_outer"), row
