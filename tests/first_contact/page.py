"""What a first contact has told, filed: kernels/benchmarks/, train/measure/profile-*.json, and a page beside it.

The page is written from train/measure/first-contact.json alone, which holds every part's lines, without those of items.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner import Row, rows
from whole import rescue

PARTS = ("machine", "smoke", "tests", "compile", "train", "decode", "graphs")
COLUMNS = ("tokens_per_second", "first_step_seconds", "peak_memory_gib", "loss_first", "loss_last", "ms_per_token")


def file(out: Path, root: Path) -> None:
    """Copies the numbers of the folder `out` to their places under `root`, draws them, and writes the page."""
    from abyssal.train.measure.bench.draw import draw
    from abyssal.train.measure.bench.run import slug
    from abyssal.train.measure.profile.draw import draw as draw_profile

    measure = root / "train/measure"
    for path in sorted((out / "benchmarks").glob("*.json")):
        draw(Path(shutil.copy(path, root / "kernels/benchmarks" / path.name)))
    rescue(out)
    found = document(out)
    profile = out / "profile/profile.json"
    if profile.is_file():
        told = json.loads(profile.read_text("utf-8"))
        name = slug(f"profile-{told['preset']['name']}-{told['provenance']['machine']['name']}")
        draw_profile(Path(shutil.copy(profile, measure / f"{name}.json")))
        found["profile"] = f"{name}.png"
    (measure / "first-contact.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (measure / "FIRST_CONTACT.md").write_text(page(found), "utf-8")


def document(out: Path) -> dict[str, Any]:
    """Of every part what became of it and what it told."""
    parts = json.loads((out / "parts.json").read_text("utf-8"))
    return {"parts": parts, "told": {n: [r for r in rows(out, n) if "begin" not in r] for n in PARTS}, "profile": None}


def page(found: dict[str, Any]) -> str:
    return "\n".join([*_lines(found), ""])


def _lines(found: dict[str, Any]) -> Iterator[str]:
    told = found["told"]
    yield "# First contact"
    yield ""
    yield "What `python tests/first_contact` measured, written by `python tests/benchmark_page.py --from FOLDER`."
    yield "Numbers of single ops are in [BENCHMARKS.md](../../kernels/BENCHMARKS.md)."
    yield ""
    yield from _machine(told["machine"])
    yield from _table(("part", "status", "seconds", "note"), found["parts"])
    for row in told["smoke"]:
        if "right" in row:
            yield (
                f"`nano`, {row['item']}, against its definitions: losses {row['apart']:.1e} apart, gradient "
                f"{row['gradient']:.1e}: {'right' if row['right'] else '**wrong**'}."
            )
    yield from (f"Tests: {row['report']}." for row in told["tests"] if "report" in row)
    for row in [row for row in told["compile"] if "cpu_seconds" in row][-1:]:
        yield f"Compiled ahead: {row['compiled']} kernels, {row['cpu_seconds']} CPU-seconds in {row['seconds']} s."
    yield ""
    speeds = [{"run": f"{n} {r['item']}", **r} for n in ("train", "decode", "graphs") for r in told[n] if "item" in r]
    yield from _table(("run", *(c for c in COLUMNS if any(c in r for r in speeds)), "note"), speeds)
    if found["profile"]:
        yield f"![Time of a training step and of a decoded token by mechanism]({found['profile']})"


def _machine(told: list[Row]) -> Iterator[str]:
    """Where the numbers come from."""
    known: dict[str, Any] = {name: value for row in told for name, value in row.items()}
    if not known:
        return
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    source, clocks = known["source"], known["clocks"]
    changed = " with changes" if source["uncommitted_changes"] else ""
    where = f"{known['machine']['name']}, driver {known.get('driver', '-')}, {known['cores']} cores"
    yield f"{where}, {known['time'][:10]}."
    yield f"Commit {(source['commit'] or 'unknown')[:8]}{changed}; {versions}."
    yield f"Clocks: {', '.join(f'{name} {value}' for name, value in clocks.items()) or 'not told'}."
    yield ""


def _table(columns: tuple[str, ...], found: list[Row]) -> Iterator[str]:
    if not found:
        return
    yield f"| {' | '.join(name.replace('_', ' ') for name in columns)} |"
    yield "|" + " --- |" * len(columns)
    for row in found:
        yield f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |"
    yield ""


def _cell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
