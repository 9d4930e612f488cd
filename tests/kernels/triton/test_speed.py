"""What the model of speed.py finds in compiled kernels for Hopper, in half precision, and what it must not find there.

repeated   several warps compute the same elements of a product
narrow     a product takes instructions of fewer columns than its tile allows
waits      a loop with a product loads a block and waits for it, where it could be copied while the last is multiplied
serial     the assembler lets every wgmma be waited for before the next
"""

import os
from typing import Any

import aot
import pytest
import record
import speed

ODD = "of widths that no block can be copied asynchronously from"
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("attention_list", "repeated"): "of six heads, which fill no tile",
    ("queries_list", "repeated"): "as attention_list",
    ("key_gradient", "serial"): "not yet looked into",
    ("query_gradient", "serial"): "of the product in a branch, without which registers spill",
    ("project_backward", "repeated"): "of eight streams, whose rows fill no tile",
    ("project_backward", "waits"): "the streams themselves",
    **{(kernel, "waits"): ODD for kernel in ("grouped", "grouped_outer", "product", "symmetric")},
    **{(kernel, "waits"): ODD for kernel in ("grouped_swiglu", "grouped_swiglu_backward")},
}
SAMPLE = {  # of each op that multiplies a case that is soon compiled, where the record is stale
    "attention": "attention, bf16, h=4 d=64 k=32",
    "hyper": "mHC, bf16, n=1 d=64",
    "index_loss": "loss, bf16, i=4 e=32 k=32 h=4 d=64",
    "index_topk": "top-k, bf16, h=64 d=128 k=512 p=8192, one query",
    "moe_experts": "experts, bf16, d=128 n=64 K=4",
    "newton_schulz": "newton_schulz, bf16, 128 x 64",
}
PLANTED = """
import torch
import triton
import triton.language as tl


@triton.jit
def planted(x, y, out, n):
    i, j = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((64, 64), tl.float32)
    for k in range(0, n, 64):
        a, b = tl.load(x + i * n + k + j), tl.load(y + (k + i) * 64 + j)
        total = tl.dot(tl.dot(a, b).to(tl.bfloat16), b, total)
    tl.store(out + i * 64 + j, total)


def run():
    x = torch.empty(64, 640, dtype=torch.bfloat16)
    planted[1,](x, x, torch.empty(64, 64), 640, num_warps=8, num_stages=1)


CASES, PRODUCTS = {"planted": (["sm_90"], run)}, {"planted"}
"""
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [%s], instrShape = [16, %d, 16]}>
    %%0 = scf.for %%i = %%a to %%b step %%c : i32  {
      %%1 = tt.load %%p : tensor<%dx64x!tt.ptr<bf16>, #blocked> loc(#loc1)
      %%2 = ttng.warp_group_dot %%x, %%y, %%z {a = 0 : i32} : !ttg.memdesc<%dx64xbf16, #s> * !ttg.memdesc<64x%dxbf16>
          -> tensor<%dx%dxf32, #mma> loc(#loc1)
    } loc(#loc2)
#loc1 = loc("y"(#loc3))
#loc2 = loc("file.py":5:3)
#loc3 = loc(callsite(#loc4 at #loc2))
#loc4 = loc("file.py":7:3)
"""


@pytest.mark.parametrize("op", aot.OPS)
def test_no_product_is_wasteful_but_those_that_we_know(op):
    entry = record.fresh_speed(op)
    rows = entry["kernels"] if entry else record.predicted("--digests", op, SAMPLE[op]) if op in SAMPLE else []
    found = {(row["kernel"], rule): (what, row["case"]) for row in rows for rule, what in speed.broken(row).items()}
    assert not {key: told for key, told in found.items() if key not in EXCEPTIONS}
    if entry:
        kernels = {row["kernel"] for row in rows}
        assert {key for key in EXCEPTIONS if key[0] in kernels} == set(found), "an exception that is none any more"


@pytest.mark.slow("a kernel is compiled")
def test_what_is_planted_is_found(tmp_path, monkeypatch):
    (tmp_path / "compiled_planted.py").write_text(PLANTED, "utf-8")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # what it holds names the file of its first run
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (row,) = record.predicted("--digests", "planted", "planted")
    assert set(speed.broken(row)) == {"repeated", "waits"}, row
    straight, loop = row["loops"]
    assert loop["over"] == "range(0, n, 64)" and not straight["tensor"] and loop["loaded"] == 2 * 64 * 64 * 2
    first, second = 8 * max(16, 64 * 48 / speed.SHARED), 4 * 16  # of 32 columns all: one from shared memory, and twice
    assert loop["HGMMA"] == 12 and loop["tensor"] == 2 * (first + second)  # for each warp group
    assert loop["serial"] > speed.MEMORY + loop["tensor"]  # what is loaded is waited for


def ir(warps: str, columns: int, m: int, n: int) -> Any:
    text = TTGIR % (warps, columns, m, m, n, m, n)
    return speed.read(text.replace("\n          ->", " ->"))


@pytest.mark.parametrize(
    "warps, columns, m, n, repeats, narrow",
    [
        ("4, 1", 256, 64, 256, 1, False),
        ("4, 1", 128, 64, 256, 1, True),
        ("8, 1", 64, 64, 64, 2, False),
        ("8, 1", 256, 128, 256, 1, False),
        ("4, 2", 32, 64, 64, 1, False),
        ("4, 2", 16, 64, 64, 1, True),
        ("4, 2", 64, 64, 64, 2, False),
    ],
)
def test_products_of_an_ir(warps, columns, m, n, repeats, narrow):
    found = ir(warps, columns, m, n)
    (product,), (copy,) = found.products, found.copies
    assert (product.repeats, product.narrow, product.by) == (repeats, narrow, "wgmma SS")
    assert found.lines == {0: 5} and copy.line == 7 and found.slow_copies() == [copy]
    assert found.loaded(5) == m * 64 * 2 and found.loaded(None) == 0 and found.flops(5) == 2 * m * n * 64


def code(over: str = "range(0, n, B)", increments: tuple[int, ...] = (), **numbers: float) -> speed.Code:
    given = {"tensor": 0.0, "issue": 10.0, "shared": 0.0, "serial": 100.0, "loaded": 0.0} | numbers
    none = speed.Segment(None, "", "", [], [], 1, {}, 0.0, 0.0, 0.0, 0.0, 0.0)
    loop = speed.Segment(5, "i", over, [], list(increments), 10, {"LDG": 4}, **given)
    return speed.Code("kernel", 8, 128, 0, speed.IR([], [], {}, set()), [none, loop])


def test_turns_are_those_of_the_source():
    for over, names, turns in (
        ("range(0, n, B)", {"n": 100, "B": 32}, 4),
        ("tl.range(0, tl.cdiv(n, B), disable_licm=True)", {"n": 100, "B": 32}, 4),
        ("range(tl.program_id(0), n, tl.num_programs(0))", {"n": 100}, 10),
        ("range(low, high)", {"low": 0, "high": 2.5}, 2.5),
        ("range(tl.load(x), n)", {"for i": 3}, 3),
    ):
        assert speed.turns(code(over), names, (10, 1, 1)) == [1, turns]
    assert speed.turns(code(increments=(1, 128)), {"n": 320, "B": 32}, (1,)) == [1, 2]  # four of them at a time
    with pytest.raises(NameError, match="kernel: i in range"):
        speed.turns(code(), {"n": 100}, (1,))


@pytest.mark.parametrize(
    "bound, numbers, moved, seconds",
    [
        ("serial", {}, 0, 2 * 100),  # of four programs two at once
        ("issue", {"issue": 60.0}, 0, 4 * 60),
        ("tensor", {"tensor": 70.0}, 0, 4 * 70),
        ("L2", {"loaded": 24 * 80.0}, 0, 4 * 80),
        ("HBM", {}, 3e12, 1.755e9),
    ],
)
def test_the_busiest_part_bounds_a_launch(bound, numbers, moved, seconds):
    found = speed.predict(code("range(1)", **numbers), (4 * speed.SMS, 1, 1), {}, moved)
    assert code().programs == 2 and found.bound in (bound, "power")
    assert found.seconds * speed.CLOCK == pytest.approx(seconds * (1 if found.bound == bound else 1.189), rel=1e-2)


def test_a_changed_source_makes_a_prediction_stale(monkeypatch):
    filed = record.speeds()
    assert set(filed) == {*aot.OPS, record.PASSES}
    for op, entry in filed.items():
        assert {"tests/support/speed.py", "kernels/triton/launch.py"} <= set(entry["sources"])
        changed = {op: entry | {"sources": entry["sources"] | {"kernels/triton/launch.py": "another text"}}}
        monkeypatch.setattr(record, "speeds", lambda changed=changed: changed)
        assert record.fresh_speed(op) is None
