"""From times to a table: rates of useful work, and the share of the roofline limit."""

import textwrap
from typing import Any

from ..roofline import Peak
from .ours import BASE
from .task import Task

BOTH = "forward + backward"


def columns(task: Task, row: dict[str, Any], peak: Peak, measured: Peak) -> dict[str, Any]:
    """What follows from a row's times: work, limits, rates and shares, by stage, from the median of its times."""
    training, stages = task.training_forward or task.forward, {"forward": [task.forward]}
    if task.backward:
        stages |= {"training forward": [training], "backward": [task.backward], BOTH: [training, task.backward]}
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


def against_base(rows: list[dict[str, Any]]) -> None:
    """Adds to our own rows how many times as fast they are as those of the other commit, by stage."""
    base = {row["contender"]: row for row in rows if "milliseconds" in row}
    for row in rows:
        other = base.get(BASE + row["contender"])
        if other and "milliseconds" in row:
            row["times_as_fast_as_base"] = {
                stage: other["milliseconds"][stage]["median"] / ms["median"]
                for stage, ms in row["milliseconds"].items()
            }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one task at one shape and length."""
    first = rows[0]
    fwd, both = (first["stages"].get(stage) for stage in ("forward", BOTH))
    limits = f"limit: forward {_ms(fwd['limit_ms'])} ms ({fwd['bound']})"
    stage, gap = f"{'ms (20-80 %)':>19s} {{:>6s}} {'share':>6s}", 33 * " "
    if both:
        limits += f", forward + backward {_ms(both['limit_ms'])} ms ({both['bound']})"
    lines = [
        f"{first['shape']} {first['task']}  T={first['tokens']:,}   {limits}",
        f"{'':25s} {'forward':^33s} {'forward + backward' if both else '':^33s} {'memory, MiB':^15s} {'max rel.':>8s}",
        f"{'contender':25s} {stage.format(_rate(fwd)[0])} {stage.format(_rate(both)[0]) if both else gap} "
        f"{'kept':>7s} {'peak':>7s} {'error':>8s}",
        *(_line(row) for row in rows),
    ]
    lines += textwrap.wrap(first_calls(rows), 118)
    for row in rows:
        if "times_as_fast_as_base" in row:
            ratios = (f"{name} {ratio:.2f} x" for name, ratio in row["times_as_fast_as_base"].items())
            lines.append(f"{row['contender']}, times as fast as the base: {', '.join(ratios)}")
    return "\n".join(lines)


def first_calls(rows: list[dict[str, Any]]) -> str:
    """What each contender's first turn took, which no time holds."""
    told = (f"{row['contender']} {_ms(row['first_call'])}" for row in rows if "first_call" in row)
    return f"first call, with what it compiles, s: {', '.join(told)}"


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['contender']:25s} {row['status']}: {row['note']}"
    cells = [f"{row['contender']:25s}"]
    for stage in ("forward", BOTH):
        if stage not in row["stages"]:
            cells.append(33 * " ")
            continue
        ms, found = row["milliseconds"][stage], row["stages"][stage]
        cells += [
            "{} ({}-{})".format(*(_time(ms[key]) for key in ("median", "p20", "p80"))).rjust(19),
            f"{_rate(found)[1]:>6s}",
        ]
        cells += [f"{found['share_of_limit']:6.{0 if found['share_of_limit'] > 0.095 else 1}%}"]
    cells += [f"{row['memory'][key] / 2**20:7,.1f}" for key in ("kept", "peak")]
    error = row["error"]["largest"]
    return " ".join([*cells, f"{error:8.1e}" if error else f"{'-':>8s}"])


def _rate(found: dict[str, Any]) -> tuple[str, str]:
    """Unit and value: of FLOPs, or of bytes where nothing is multiplied."""
    if not found["flops"]:
        return "GB/s", _value(found.get("gigabytes_per_second", 0))
    teraflops = found.get("teraflops", 0)
    if found["flops"] / found["limit_ms"] > 1e9:
        return "TF/s", _value(teraflops)
    return "GF/s", _value(1e3 * teraflops)


def _value(rate: float) -> str:
    """As `_ms`, in at most six characters below 100,000."""
    return f"{rate:.4f}" if rate < 0.01 else _ms(rate)


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"


def _time(ms: float) -> str:
    """As `_ms`, in at most five characters below 10,000."""
    return f"{ms:.3f}" if ms < 1 else _ms(ms)
