"""The tables of kernels/BENCHMARKS.md, written from kernels/benchmarks/*.json.

python tests/benchmark_page.py              after `abyssal bench [OP] --out kernels/benchmarks`
python tests/benchmark_page.py --compile [OP ...]   first compile the Triton configurations that ship: compiled.json
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, FOLDER = ROOT / "kernels/BENCHMARKS.md", ROOT / "kernels/benchmarks"
TARGETS = ("sm_80", "sm_90", "sm_100")
SUPPORT = ROOT / "tests/support"
OPS = [path.stem.removeprefix("compiled_") for path in sorted(SUPPORT.glob("compiled_*.py"))]
SHOWN = "sm_90"  # the architecture whose products the page lists one by one
BOTH = "forward + backward"
Rows = list[dict[str, Any]]


def page(text: str) -> str:
    """The text with its tables written anew."""
    for name, lines in (("compiled", compiled()), ("measured", measured())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        assert end in rest, f"{PAGE.name} has no {start.strip()} ... {end}"
        text = before + start + "\n".join(["", *lines, end]) + rest.partition(end)[2]
    return text


def compiled() -> Iterator[str]:
    """A summary for each op and architecture, and the matrix products on one architecture one by one."""
    found = json.loads((FOLDER / "compiled.json").read_text("utf-8"))
    yield from table(
        "op", "architecture", "kernels", "spilled bytes", "registers, at most", "shared KiB, at most", "float atomics"
    )
    for op in found:
        for target in TARGETS:
            mine = [row for row in found[op]["rows"] if row["target"] == target]
            if mine:
                sums, most = (
                    [f([row[key] for row in mine]) for key in keys]
                    for f, keys in ((sum, ("spilled", "float atomics")), (max, ("registers", "shared")))
                )
                yield line(op, target, len(mine), sums[0], most[0], kib(most[1]), sums[1])
    yield ""
    for told, ops in grouped({op: provenance(found[op]) for op in found}).items():
        yield f"{', '.join(ops)}: {told}."
    yield ""
    yield f"The matrix products on {SHOWN}:"
    yield ""
    yield from table("op", "case", "product", "warps", "registers", "shared KiB", "HGMMA", "MMA", "TMA")
    for op in found:
        for row in found[op]["rows"]:
            if row["product"] and row["target"] == SHOWN:
                resources = row["warps"], row["registers"], kib(row["shared"])
                yield line(op, row["case"], row["kernel"], *resources, row.get("hgmma", "-"), row["mma"], row["tma"])
    yield ""


def grouped(names: dict[str, str]) -> dict[str, list[str]]:
    """Value to the keys that have it."""
    found: dict[str, list[str]] = {}
    for key, value in names.items():
        found.setdefault(value, []).append(key)
    return found


def measured() -> Iterator[str]:
    """A table for each benchmark."""
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        if "op" not in found:
            continue
        machine, peak = found["provenance"]["machine"], found["peaks"]["datasheet"] or found["peaks"]["measured"]
        reached = f"{peak['flops'] / 1e12:.3g} TFLOP/s, {peak['bytes'] / 1e9:,.0f} GB/s, {peak['source']}"
        yield f"### {found['op']}: {', '.join(found['shapes'])} on {machine['name']}"
        yield ""
        yield f"{machine['threads']} threads, {found['dtype']}, {found['data']} data, {found['repeats']} turns."
        yield from state(found)
        yield f"Peak: {reached}. {provenance(found['provenance'])}."
        yield ""
        yield f"![Rates and memory of the contenders](benchmarks/{path.stem}.png)"
        yield ""
        yield from table(
            "shape, task", "T", "contender", "forward, ms", "rate", "share", f"{BOTH}, ms", "rate", "share",
            "kept MiB", "peak MiB", "max rel. error",
        )  # fmt: skip
        yield from (measurement(row) for row in found["rows"] if row["status"] == "ok")
        yield ""
        left_out = dict.fromkeys(f"{r['contender']}, {r['status']}: {r['note']}" for r in found["rows"] if r["note"])
        yield f"Left out: {'; '.join(left_out) or 'nothing'}."
        yield ""


def state(found: dict[str, Any]) -> Iterator[str]:
    """Tests and clocks, which the first files do not tell."""
    if "tests" in found:
        clocks = ", ".join(f"{name} {value}" for name, value in found["provenance"]["clocks"]["before"].items())
        yield f"Tests: {found['tests']}. Clocks: {clocks or 'not told'}."


def measurement(row: dict[str, Any]) -> str:
    cells = [f"{row['shape']} {row['task']}", f"{row['tokens']:,}", row["contender"]]
    for stage in ("forward", BOTH):
        if stage not in row["stages"]:
            cells += ["", "", ""]
            continue
        ms, rates = row["milliseconds"][stage], row["stages"][stage]
        share = rates["share_of_limit"]
        spread = f"{number(ms['p20'])}-{number(ms['p80'])}" if "p20" in ms else f"fastest {number(ms['min'])}"
        cells += [f"{number(ms['median'])} ({spread})", rate(rates), f"{share:.{0 if share > 0.095 else 1}%}"]
    memory = [f"{row['memory'][key] / 2**20:,.1f}" for key in ("kept", "peak")]
    return line(*cells, *memory, f"{row['error']['largest']:.0e}" if row["error"]["largest"] else "")


def rate(found: dict[str, Any]) -> str:
    if not found["flops"]:
        return f"{found['gigabytes_per_second']:.2g} GB/s"
    teraflops = found["teraflops"]
    return f"{teraflops:.3g} TF/s" if teraflops >= 1 else f"{1e3 * teraflops:.3g} GF/s"


def number(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"


def provenance(found: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {v}" for name, v in found["versions"].items() if name in ("torch", "triton", "transformers")
    )
    changed = " with changes" if found["source"]["uncommitted_changes"] else ""
    return f"{found['time'][:10]}, commit {found['source']['commit'][:8]}{changed}, {versions}"


def table(*names: str) -> Iterator[str]:
    yield line(*names)
    yield "|" + " --- |" * len(names)


def line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def kib(size: int) -> str:
    return f"{size / 1024:.1f}"


def compile_ops(ops: list[str]) -> None:
    """Every shipped kernel of these ops for every architecture, in processes in which no kernel is interpreted."""
    sys.path[:0] = [str(ROOT), str(SUPPORT)]
    from abyssal.train import provenance

    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "compiled.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for op in ops:
        print(f"compiling {op}", flush=True)
        found[op] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "source": provenance.source(),
            "versions": provenance.versions(),
            "rows": compile_op(op),
        }
        ordered = {name: found[name] for name in OPS if name in found}
        path.write_text(json.dumps(ordered).replace('{"target"', '\n{"target"') + "\n", "utf-8")


def compile_op(op: str) -> Rows:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, SUPPORT / "aot.py", "--json", "--only", op, *TARGETS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    products = importlib.import_module(f"compiled_{op}").PRODUCTS
    rows = json.loads(done.stdout.splitlines()[-1])
    return [row | {"product": row["kernel"] in products} for row in rows]


if __name__ == "__main__":
    if "--compile" in sys.argv[1:]:
        compile_ops(sys.argv[2:] or OPS)
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
