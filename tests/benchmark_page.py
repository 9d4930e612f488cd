"""The tables of kernels/BENCHMARKS.md, written from kernels/benchmarks/*.json.

python tests/benchmark_page.py              after `abyssal bench [OP] --out kernels/benchmarks`
python tests/benchmark_page.py --from FOLDER        first file what `python tests/first_contact` measured on a GPU
python tests/benchmark_page.py --compile [OP ...]   first compile the Triton configurations that ship: compiled.json
python tests/benchmark_page.py --speed [OP ...]     first predict what an H100 takes for them: speed.json

The record of another triton is made with that one first on the path:

pip install --no-deps --target /tmp/triton triton==3.8.0
PYTHONPATH=/tmp/triton TRITON_CACHE_DIR=/tmp/triton-cache python tests/benchmark_page.py --compile
"""

import argparse
import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, FOLDER = ROOT / "kernels/BENCHMARKS.md", ROOT / "kernels/benchmarks"
sys.path[:0] = [str(ROOT / "tests/support")]
import aot  # noqa: E402
import record  # noqa: E402

SHOWN = "3.7.1", "sm_90"  # triton and architecture whose products the page lists one by one
BOTH = "forward + backward"
# of what is predicted, what the page shows
PREDICTED = re.compile(
    r"(v4-flash, (4096|65536|a token|a token after 131072)|small, 8 x 2048|main, 32768)(,.*)?$|8192$|of"
)
Rows = list[dict[str, Any]]


def page(text: str) -> str:
    """The text with its tables written anew."""
    for name, lines in (("compiled", compiled()), ("speed", speed()), ("measured", measured())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        assert end in rest, f"{PAGE.name} has no {start.strip()} ... {end}"
        text = before + start + "\n".join(["", *lines, end]) + rest.partition(end)[2]
    return text


def compiled() -> Iterator[str]:
    """A summary for each op, architecture and version of triton, and the matrix products of one version."""
    entries = record.load()
    versions = sorted({version for op in entries for version in entries[op]})
    yield from table("op", "architecture", "kernels", *(f"triton {version}" for version in versions))
    for op, target in itertools.product(entries, aot.TARGETS):
        rows = [[row for row in record.rows(op, entries[op].get(v)) if row["target"] == target] for v in versions]
        if any(rows):
            yield line(op, target, max(map(len, rows)), *map(summary, rows))
    yield ""
    for told, ops in grouped({op: recorded(entries[op]) for op in entries}).items():
        yield f"{', '.join(ops)}: {told}."
    yield ""
    version, target = SHOWN
    yield f"The matrix products on {target}, by triton {version}:"
    yield ""
    yield from table("op", "case", "product", "warps", "registers", "shared KiB", "HGMMA", "MMA", "async", "TMA")
    for op in entries:
        products = importlib.import_module(f"compiled_{op}").PRODUCTS
        for row in record.rows(op, entries[op].get(version)):
            if row["kernel"] in products and row["target"] == target:
                counts = (row.get(name, "-") for name in ("hgmma", "mma", "async", "tma"))
                yield line(op, row["case"], row["kernel"], row["warps"], row["registers"], kib(row["shared"]), *counts)
    yield ""


def speed() -> Iterator[str]:
    """What is predicted: ops at some of their shapes, and the kernels of whole passes."""
    filed = record.speeds()
    yield from table(
        "op", "shape", "forward ms", "rate", "share", "backward ms", "rate", "share", "the longest", "its bound"
    )
    for op in aot.OPS:
        rows = filed.get(op, {}).get("rows", [])
        for case, stages in itertools.groupby(rows, key=lambda row: row["case"]):
            if PREDICTED.search(case) or op == "quant":
                both = list(stages)
                cells = [
                    cell for row in both for cell in (number(row["ms"]), predicted_rate(row), f"{row['share']:.0%}")
                ]
                longest = max(both, key=lambda row: row["ms"])
                yield line(op, case, *cells, *[""] * (6 - len(cells)), f"`{longest['longest']}`", longest["bound"])
    yield ""
    for row in filed.get(record.PASSES, {}).get("rows", []):
        parts = (f"{name.removesuffix(' ms')} {number(ms)}" for name, ms in row.items() if name.endswith(" ms"))
        most = sorted(row["kernels"].items(), key=lambda item: item[1][2] - item[1][0])[:6]
        kernels = (f"`{name}` {number(ms)} (at least {number(least)})" for name, (ms, _, least) in most)
        yield f"- {row['case']}: {', '.join(parts)} ms. To gain most: {', '.join(kernels)}."
    yield ""
    for told, ops in grouped({op: f"triton {x['triton']} on {x['date']}" for op, x in filed.items()}).items():
        yield f"By {told}: {', '.join(ops)}."
    yield ""


def predicted_rate(row: dict[str, Any]) -> str:
    by_products = row["TFLOP/s"] / 798 > row["GB/s"] / 3000
    return f"{row['TFLOP/s']:.0f} TF/s" if by_products else f"{row['GB/s']:,.0f} GB/s"


def summary(rows: Rows) -> str:
    """Of the kernels of one op, architecture and version."""
    if not rows:
        return "-"
    registers, shared = (max(row[key] for row in rows) for key in ("registers", "shared"))
    return f"{sum(row['spilled'] for row in rows)} · {registers} · {kib(shared)}"


def recorded(entries: dict[str, Any]) -> str:
    """When, and beside which torch."""
    return ", ".join(f"{version} on {entry['date']} (torch {entry['torch']})" for version, entry in entries.items())


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
        yield from first_calls(found["rows"])
        left_out = dict.fromkeys(f"{r['contender']}, {r['status']}: {r['note']}" for r in found["rows"] if r["note"])
        yield f"Left out: {'; '.join(left_out) or 'nothing'}."
        yield ""


def state(found: dict[str, Any]) -> Iterator[str]:
    """Tests and clocks, which the first files do not tell."""
    if "tests" in found:
        clocks = ", ".join(f"{name} {value}" for name, value in found["provenance"]["clocks"]["before"].items())
        yield f"Tests: {found['tests']}. Clocks: {clocks or 'not told'}."


def first_calls(rows: Rows) -> Iterator[str]:
    """The longest of each contender, which the first files do not tell."""
    longest: dict[str, float] = {}
    for row in rows:
        if "first_call" in row:
            longest[row["contender"]] = max(longest.get(row["contender"], 0.0), row["first_call"])
    if longest:
        told = ", ".join(f"{name} {number(seconds)} s" for name, seconds in longest.items())
        yield f"Longest first call, with what it compiles: {told}."
        yield ""


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="*", choices=aot.OPS, metavar="OP", help="of " + ", ".join(aot.OPS))
    parser.add_argument("--from", dest="contact", type=Path, metavar="FOLDER", help="of a first contact")
    parser.add_argument("--speed", nargs="*", choices=[*aot.OPS, record.PASSES], metavar="OP", help="or passes")
    options = parser.parse_args()
    ops = options.compile
    if options.contact:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests/first_contact")]
        importlib.import_module("page").file(options.contact, ROOT)
    for op in [] if ops is None else ops or aot.OPS:
        print(f"compiling {op}", flush=True)
        record.add(op)
    for op in [] if options.speed is None else options.speed or [*aot.OPS, record.PASSES]:
        print(f"predicting {op}", flush=True)
        record.add_speed(op)
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
