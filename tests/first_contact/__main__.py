"""A GPU's first ten minutes with this repository: one command, no network, and a folder to send.

    python tests/first_contact                      everything, most important first, into first-contact-DATE/
    python tests/first_contact --seconds 300        the same with half of the time
    python tests/first_contact --cpu                every part at small sizes on a CPU, within a minute
    python tests/first_contact --only smoke,tests   some parts
    python tests/first_contact --cache DIR          kernels are compiled into DIR, and taken from there
    python tests/first_contact --compile-only --target sm_90 --cache DIR      fills DIR where no GPU is

Each part is a process with a time limit of its own and writes as it goes: OUT/PART.jsonl and PART.log, OUT/tests/ (a
line a test, tests.xml), OUT/benchmarks/*.json as of `abyssal bench`, OUT/profile/, OUT/runs/; OUT/parts.json says what
became of each, OUT/log.txt what matters. It needs what the package needs; pytest for the tests.

A cache made elsewhere holds for the same build of triton (version and Python, as its compiled library is part of every
key), the same kernels and architecture; what depends on the driver (a launcher for each signature, built by the C
compiler) is not in it. `python tests/benchmark_page.py --from OUT` files the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import correct  # noqa: E402
import fast  # noqa: E402
import whole  # noqa: E402
from runner import PRELOADED, PROCESSES, ROOT, Context, Part, rows, run_all  # noqa: E402

PARTS = [  # most important first; together the default budget
    Part("machine", correct.machine, 15),
    Part("compile", fast.compile, 75, item=600),
    Part("smoke", correct.smoke, 40, item=40),
    Part("tests", correct.tests, 150, least=20, item=600),
    Part("micro", fast.micro, 120, item=40),
    Part("train", whole.train, 85, least=25, item=600),
    Part("decode", whole.decode, 35, item=35),
    Part("graphs", whole.graphs, 40, item=40),
    Part("profile", whole.profile, 40, least=10, item=600),
]


def main() -> int:
    options = _options()
    device = "cpu" if options.cpu or options.compile_only else "cuda"
    target = options.target or ("sm_90" if device == "cpu" else _architecture())
    if not target:
        print("torch finds no CUDA device: --cpu tries everything at small sizes, --compile-only compiles ahead")
        return 2
    if options.cache:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "FIRST_CONTACT_TARGET": target}
    os.environ.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    out = options.out or Path(f"first-contact-{time.strftime('%Y%m%d-%H%M%S')}")
    out = out.resolve()
    if out.is_dir() and any(out.iterdir()):
        print(f"--out {out}: there is something in it; another folder is allowed")
        return 2
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {out}: {error.strerror}; another folder is allowed")
        return 2
    if options.compile_only:
        return _compile_only(out, options.seconds)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    PROCESSES.set_forkserver_preload(PRELOADED)
    began = time.time()
    with (out / "log.txt").open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            line = f"[{time.time() - began:4.0f} s] {text}"
            print(line, flush=True)
            print(line, file=log, flush=True)

        wanted = [part for part in PARTS if options.only is None or part.name in options.only]
        try:
            told = run_all(wanted, out, device, options.seconds, say)
        except KeyboardInterrupt:
            say("interrupted")
            told = [{"status": "cut"}]
        whole.rescue(out)
        for line in summary(out):
            say(line)
    print(f"send this folder: {out}")
    return 0 if all(row["status"] == "ok" for row in told) and not wrong(out) else 1


def wrong(out: Path) -> bool:
    """Whether a test was red or none passed, numbers are not those of the definitions, or something gave an error."""
    told = [row for part in PARTS for row in rows(out, part.name)]
    ops = [row for path in (out / "benchmarks").glob("*.json") for row in json.loads(path.read_text("utf-8"))["rows"]]
    return (
        any(row.get("red") or row.get("error") or row.get("passed") == 0 for row in told)
        or any(row.get(key) is False for row in told for key in ("right", "same_losses", "same_tokens"))
        or any(row["contender"] in ("eager", "triton") and row["status"] in ("wrong", "failed") for row in ops)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python tests/first_contact", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, help="folder to write (path; default: first-contact-DATE-TIME)")
    parser.add_argument("--seconds", type=float, default=600, help="of all parts together (float; default: 600)")
    parser.add_argument("--cpu", action="store_true", help="small sizes on a CPU (default: off)")
    text = f"parts with commas: {', '.join(names)} (str; default: all)"
    parser.add_argument("--only", type=lambda text: text.split(","), help=text)
    parser.add_argument("--cache", type=Path, help="of compiled kernels (path; default: triton's own)")
    parser.add_argument("--compile-only", action="store_true", help="fill the cache and do nothing else (default: off)")
    parser.add_argument("--target", help="to compile for (str; default: that of the GPU, sm_90 where there is none)")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only {', '.join(sorted(unknown))}: allowed are {', '.join(names)}")
    return options


def _architecture() -> str:
    """Of the GPU, "" without one; asked in a process of its own, as a driver that has been asked cannot be forked."""
    code = "import torch.cuda as c; print('sm_{}{}'.format(*c.get_device_capability()) if c.is_available() else '')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def _compile_only(out: Path, seconds: float) -> int:
    """In this process: without a GPU there is nothing that could hang. Says what it means for a first contact."""
    fast.compile(Context("compile", out, "meta", time.time() + seconds))
    for line in [*_compiled(out), *estimate(out)]:
        print(line)
    return 0 if not [row for row in rows(out, "compile") if "error" in row] else 1


# seconds of the parts where nothing is left to compile
RUNS = {"machine": 10, "smoke": 15, "tests": 45, "micro": 50, "train": 70, "decode": 20, "graphs": 35, "profile": 25}


def estimate(out: Path, cores: int = 16) -> list[str]:
    """Seconds of a GPU from what was compiled: CPU-seconds over cores, and the parts' own times."""
    found = [row for row in rows(out, "compile") if "cpu_seconds" in row]
    if not found or not found[-1]["compiled"]:
        return []
    mean = found[-1]["cpu_seconds"] / found[-1]["compiled"]
    ahead, tests = found[-1]["cpu_seconds"] / cores, mean * fast.TESTS / (cores - 2)
    total = ahead + tests + sum(RUNS.values())
    return [
        f"estimate on {cores} cores and a GPU: {mean:.1f} CPU-seconds a kernel; compiling ahead {ahead:.0f} s, the "
        f"tests' {fast.TESTS} kernels {tests:.0f} s, running {sum(RUNS.values())} s: {total:.0f} s in all, "
        f"{1.3 * total:.0f} s with a margin of 30 %",
    ]


# the summary ---------------------------------------------------------------------------------------------------------


def summary(out: Path) -> list[str]:
    """What matters of every part, in lines."""
    return [*_smoke(out), *_tests(out), *_compiled(out), *_micro(out), *_speeds(out)]


def _smoke(out: Path) -> list[str]:
    return [
        f"smoke {row['item']}: {'right' if row['right'] else 'WRONG'}, losses apart {row['apart']:.1e}, gradient"
        f" {row['gradient']:.1e}, worst tensor {row['worst_gradient'][0]:.1e} ({row['worst_gradient'][1]})"
        for row in rows(out, "smoke")
        if "right" in row
    ]


def _tests(out: Path) -> list[str]:
    lines = []
    for row in rows(out, "tests"):
        if "report" in row:
            lines += [f"tests: {row['report']}"]
            lines += [f"  {red['outcome']}: {red['id']}" for red in row.get("red", [])[:20]]
    return lines


def _compiled(out: Path) -> list[str]:
    told = rows(out, "compile")
    lines = [f"compile: {row.get('item', row.get('kernel'))}: {row['error']}" for row in told if "error" in row]
    for row in [row for row in told if "cpu_seconds" in row][-1:]:
        lines += [f"compile: {row['compiled']} kernels, {row['cpu_seconds']} CPU-seconds in {row['seconds']} s"]
    return lines


def _micro(out: Path) -> list[str]:
    """The median of each task by Triton (on a CPU by eager), and its share of the limit."""
    lines = [f"micro {row['op']}: {row['error']}" for row in rows(out, "micro") if "error" in row]
    for path in sorted((out / "benchmarks").glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        for row in found["rows"]:
            if row["contender"] == "triton" and row["status"] != "ok":
                lines += [f"micro {found['op']} {row['task']} T={row['tokens']}: {row['status']}, {row['note']}"]
            elif row["status"] == "ok":
                times = (
                    f"{stage} {row['milliseconds'][stage]['median']:.3g} ms ({told['share_of_limit']:.0%} of the limit)"
                    for stage, told in row["stages"].items()
                    if stage in ("forward", "backward")
                )
                lines += [f"micro {found['op']} {row['task']} T={row['tokens']} {row['contender']}: {', '.join(times)}"]
    return lines


def _speeds(out: Path) -> list[str]:
    lines = []
    for name in ("train", "decode", "graphs"):
        for row in rows(out, name):
            if "note" in row:
                lines += [f"{name} {row['item']}: {row['note']}"]
            elif "tokens_per_second" in row:
                more = {key: row[key] for key in ("peak_memory_gib", "loss_first", "loss_last") if key in row}
                told = ", ".join(f"{key} {value:.4g}" for key, value in more.items())
                lines += [f"{name} {row['item']}: {row['tokens_per_second']:,.1f} tokens/s{told and ', ' + told}"]
            elif "same_losses" in row:
                lines += [f"graphs against eager: {', '.join(f'{key} {value}' for key, value in row.items())}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
