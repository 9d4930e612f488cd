"""Rows of the two steps, and their tables."""

from collections.abc import Iterable
from typing import Any

from ..roofline import Peak, Work
from .limits import Works
from .mechanisms import MECHANISMS
from .observe import OPTIMIZER

PHASES = {"training": ("forward", "backward", OPTIMIZER), "decode": ("decode",)}
Times = dict[tuple[str, str], float]


def mechanism_rows(step: str, times: Times, works: Works, peak: Peak) -> dict[str, dict[str, Any]]:
    """By mechanism and phase: milliseconds, FLOPs, bytes and the limit; their totals; the share of the step."""
    whole = sum(times.values())
    rows = {}
    for mechanism in MECHANISMS:
        phases = {
            phase: {"ms": times.get((phase, mechanism), 0.0)} | _limit(works.get((phase, mechanism), ()), peak)
            for phase in PHASES[step]
        }
        total = {key: sum(found[key] for found in phases.values()) for key in ("ms", "flops", "bytes", "limit_ms")}
        if total["ms"] or total["limit_ms"]:
            known = total["limit_ms"] and total["ms"]
            share = total["limit_ms"] / total["ms"] if known else None
            rows[mechanism] = {"phases": phases, **total, "share": total["ms"] / whole, "share_of_limit": share}
    return rows


def _limit(works: Iterable[Work], peak: Peak) -> dict[str, float]:
    """Ops run one after the other: the limits of each add up."""
    works = list(works)
    return {
        "flops": sum(work.flops for work in works),
        "bytes": sum(work.bytes for work in works),
        "limit_ms": 1e3 * sum(map(peak.seconds, works)),
    }


def add_kernels(rows: dict[str, dict[str, Any]], kernels: Times) -> None:
    """Adds the milliseconds of the GPU's kernels to the rows."""
    for name, row in rows.items():
        row["kernel_ms"] = sum(ms for (_, mechanism), ms in kernels.items() if mechanism == name)


def by_phase(times: Times) -> dict[str, float]:
    """Milliseconds of each phase, whatever the mechanism, and their sum."""
    found = {phase: 0.0 for phase, _ in times}
    for (phase, _), ms in times.items():
        found[phase] += ms
    return found | {"total": sum(times.values())}


def heading(result: dict[str, Any]) -> str:
    preset, machine, versions = result["preset"], result["provenance"]["machine"], result["provenance"]["versions"]
    source, peak = result["provenance"]["source"], result["peak"]
    commit = (source["commit"] or "no commit")[:8] + (" with changes" if source["uncommitted_changes"] else "")
    threads = "" if machine["device"].startswith("cuda") else f", {machine['threads']} threads"
    return "\n".join(
        (
            f"{preset['name']}: {preset['parameters']:,} parameters, {preset['dtype']}, on {machine['name']}{threads}",
            f"commit {commit}, torch {versions['torch']}, triton {versions['triton']}",
            f"peak {peak['flops'] / 1e12:.3g} TFLOP/s, {peak['bytes'] / 1e9:,.0f} GB/s ({peak['source']})",
        )
    )


def training_table(step: dict[str, Any]) -> str:
    kernels = any("kernel_ms" in row for row in step["mechanisms"].values())
    head = f"{'mechanism':18s} {'forward':>9s} {'backward':>9s} {'ms':>9s} {'share':>6s}"
    head += f" {'kernels':>9s}" if kernels else ""
    head += f" {'GFLOP':>8s} {'limit ms':>9s} {'of limit':>8s} {'kept MiB':>9s} {'param MiB':>9s}"
    lines = [f"training step: {step['rows']} x {step['tokens']:,} tokens, {step['text']}", head]
    for name, row in step["mechanisms"].items():
        cells = [f"{name:18s}", *(_ms(row["phases"][phase]["ms"], 9) for phase in ("forward", "backward"))]
        cells += [_ms(row["ms"], 9), f"{row['share']:6.1%}", *([_ms(row.get("kernel_ms", 0), 9)] if kernels else [])]
        cells += [f"{row['flops'] / 1e9:8.3g}" if row["flops"] else f"{'-':>8s}", _ms(row["limit_ms"], 9)]
        cells += [_share(row["share_of_limit"]), _mib(row["kept"]), _mib(row["parameters"])]
        lines.append(" ".join(cells))
    rows = step["mechanisms"].values()
    phases = [sum(row["phases"][phase]["ms"] for row in rows) for phase in ("forward", "backward")]
    sums = {key: sum(row.get(key) or 0 for row in rows) for key in ("ms", "flops", "limit_ms", "kept", "parameters")}
    cells = [f"{'sum':18s}", *(_ms(ms, 9) for ms in phases), _ms(sums["ms"], 9), f"{1:6.1%}"]
    cells += [_ms(sum(row.get("kernel_ms", 0) for row in rows), 9)] if kernels else []
    cells += [f"{sums['flops'] / 1e9:8.3g}", _ms(sums["limit_ms"], 9), _share(sums["limit_ms"] / sums["ms"])]
    lines.append(" ".join([*cells, _mib(sums["kept"]), _mib(sums["parameters"])]))
    return "\n".join([*lines, _whole(step), _memory(step)])


def decode_table(step: dict[str, Any]) -> str:
    kernels = any("kernel_ms" in row for row in step["mechanisms"].values())
    title = f"decode step: {step['rows']} x 1 token behind {step['length']:,}, by {step['path']}"
    head = f"{'mechanism':18s} {'ms':>9s} {'share':>6s}" + (f" {'kernels':>9s}" if kernels else "")
    lines = [title, f"{head} {'MFLOP':>8s} {'MB':>8s} {'limit ms':>9s} {'of limit':>8s}"]
    sums = dict.fromkeys(("ms", "share", "kernel_ms", "flops", "bytes", "limit_ms"), 0.0)
    for row in step["mechanisms"].values():
        sums = {key: value + row.get(key, 0) for key, value in sums.items()}
    sums["share_of_limit"] = sums["limit_ms"] / sums["ms"]
    for name, row in [*step["mechanisms"].items(), ("sum", sums)]:
        cells = [f"{name:18s}", _ms(row["ms"], 9), f"{row['share']:6.1%}"]
        cells += [_ms(row.get("kernel_ms", 0), 9)] if kernels else []
        cells += [f"{row['flops'] / 1e6:8.3g}" if row["flops"] else f"{'-':>8s}"]
        cells += [f"{row['bytes'] / 1e6:8.3g}" if row["bytes"] else f"{'-':>8s}"]
        lines.append(" ".join([*cells, _ms(row["limit_ms"], 9), _share(row["share_of_limit"])]))
    return "\n".join([*lines, _whole(step)])


def _whole(step: dict[str, Any]) -> str:
    """The step as it is when nobody looks, beside the sum of its parts."""
    plain, parts = step["plain_ms"], step["parts_ms"]
    phases = ", ".join(f"{phase} {_ms(ms)}" for phase, ms in plain.items() if phase != "total")
    split = f" ({phases})" if len(plain) > 2 else ""
    ratio = parts["total"] / plain["total"] - 1
    return (
        f"not instrumented: {_ms(plain['total'])} ms{split}; "
        f"the parts add up to {_ms(parts['total'])} ms, {abs(ratio):.1%} {'more' if ratio > 0 else 'less'}"
    )


def _memory(step: dict[str, Any]) -> str:
    memory = step["memory"]
    where = f" (in {' of '.join(reversed(memory['peak_at']))})" if memory.get("peak_at") else ""
    parts = (f"{name} {memory[name] / 2**20:,.1f}" for name in ("parameters", "gradients", "optimizer", "kept"))
    return f"memory, MiB: {', '.join(parts)}; peak {memory['peak'] / 2**20:,.1f}{where}"


def _ms(ms: float, width: int = 0) -> str:
    if not ms:
        return f"{'-':>{width}s}"
    return f"{ms:{width},.0f}" if ms >= 1000 else f"{ms:{width}.3g}" if ms >= 0.001 else f"{ms:{width}.0e}"


def _share(share: float | None) -> str:
    if share is None:
        return f"{'-':>8s}"
    return f"{share:8.{0 if share > 0.095 else 1}%}"


def _mib(size: int) -> str:
    return f"{size / 2**20:9,.1f}" if size else f"{'-':>9s}"
