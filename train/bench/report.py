"""From times to a table: rates of useful work, and the share of the roofline limit."""

from typing import Any

from ..roofline import Peak
from .task import Task

BOTH = "forward + backward"


def columns(task: Task, row: dict[str, Any], peak: Peak, measured: Peak) -> dict[str, Any]:
    """What follows from a row's times: work, limits, rates and shares, by stage, from the median of its times."""
    stages = {
        "forward": [task.forward],
        "training forward": [task.training_forward],
        "backward": [task.backward],
        BOTH: [task.training_forward, task.backward],
    }
    out: dict[str, Any] = {"stages": {}, "kept_by_formula": task.kept}
    for stage, parts in stages.items():
        work = sum(parts[1:], parts[0])
        limit, reachable = (1e3 * sum(map(p.seconds, parts)) for p in (peak, measured))
        found = {"flops": work.flops, "bytes": work.bytes, "limit_ms": limit, "bound": peak.bound(work)}
        if "milliseconds" in row:
            ms = row["milliseconds"][stage]["median"]
            found |= {
                "teraflops": work.flops / ms / 1e9,
                "gigabytes_per_second": work.bytes / ms / 1e6,
                "share_of_limit": limit / ms,
                "share_of_measured_limit": reachable / ms,
            }
        out["stages"][stage] = found
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one task at one shape and length."""
    first = rows[0]
    fwd, both = (first["stages"][stage] for stage in ("forward", BOTH))
    stage = f"{'ms (min)':>17s} {_rate(fwd)[0]:>6s} {'share':>6s}"
    lines = [
        f"{first['shape']} {first['task']}  T={first['tokens']:,}   limit: forward {_ms(fwd['limit_ms'])} ms "
        f"({fwd['bound']}), forward + backward {_ms(both['limit_ms'])} ms ({both['bound']})",
        f"{'':26s} {'forward':^31s} {'forward + backward':^31s} {'memory, MiB':^15s} {'max rel.':>8s}",
        f"{'contender':26s} {stage} {stage} {'kept':>7s} {'peak':>7s} {'error':>8s}",
    ]
    return "\n".join(lines + [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['contender']:26s} {row['status']}: {row['note']}"
    cells = [f"{row['contender']:26s}"]
    for stage in ("forward", BOTH):
        ms, found = row["milliseconds"][stage], row["stages"][stage]
        cells += [f"{_ms(ms['median'])} ({_ms(ms['min'])})".rjust(17), f"{_rate(found)[1]:>6s}"]
        cells += [f"{found['share_of_limit']:6.{0 if found['share_of_limit'] > 0.095 else 1}%}"]
    cells += [f"{row['memory'][key] / 2**20:7,.1f}" for key in ("kept", "peak")]
    error = row["error"]["largest"]
    return " ".join([*cells, f"{error:8.1e}" if error else f"{'-':>8s}"])


def _rate(found: dict[str, Any]) -> tuple[str, str]:
    """Unit and value: of FLOPs, or of bytes where nothing is multiplied."""
    if not found["flops"]:
        return "GB/s", f"{found.get('gigabytes_per_second', 0):.3g}"
    teraflops = found.get("teraflops", 0)
    if found["flops"] / found["limit_ms"] > 1e9:
        return "TF/s", f"{teraflops:.3g}"
    return "GF/s", f"{1e3 * teraflops:.3g}"


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"
