"""Kills a training at random moments, again and again: does every resumption end in the bits of the run in one go?

    python tests/support/kills.py --kills 100

The run is small and has everything that must survive: three stages of attention, passes that add up to a step, a batch
that spikes the loss, the way back from it, experts chosen ahead, evaluations, a checkpoint every other step of which
two are kept. This process imports torch once and never trains; each attempt is a fork of it that starts the run, or
resumes it, and is killed (SIGKILL) after a random time, wherever it is: building the model, in a step, while it writes
a line; every third time or so while it writes a checkpoint. When the run is done, checkpoint, metrics and sample are
compared, and another one begins, until there were enough kills.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (what an optimizer imports first: not again in each fork)
from safetensors.torch import load_file  # noqa: E402

from abyssal.train import start  # noqa: E402
from abyssal.train.data.rows import Batch  # noqa: E402
from abyssal.train.recipe import Recipe, load_recipe  # noqa: E402
from abyssal.train.run import checkpoint, metrics  # noqa: E402

CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib", "anticipation_seconds"}
SENTENCE = "the stream of tokens runs through windows and compressed entries while experts are chosen by score"
POISONED = range(12, 14)  # rows of the last stage
STAGES = [
    {"steps": 2, "attention": "dense", "sequence_length": 24},
    {"steps": 2, "attention": "warmup", "sequence_length": 48},
    {"steps": 10, "sequence_length": 48},
]


def write_texts(folder: Path) -> None:
    words = SENTENCE.split()
    draw = random.Random(0)
    for i in range(8):
        text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(20))
        (folder / f"text{i}.txt").write_text(text + "\n", "utf-8")


def make_recipe(texts: Path) -> Recipe:
    keys = [
        f"data.source='{texts}'",
        *("data.batch_size=2", "data.sequence_length=48", "data.held_out_rows=2", "train.micro_batch=1"),
        *("optim.warmup_steps=2", "train.eval_every=5", "train.checkpoint_every=2", "train.observe_every=4"),
        *("train.sample_tokens=4", "train.device='cpu'", "schedule.mtp_final_share=0.5"),
        *("stability.window=4", "stability.deviations=2", "stability.least=0.2"),
        *(
            "stability.anticipatory_steps=2",
            "stability.lag=2",
            "model.num_hidden_layers=3",
            "model.compress_ratios=[0, 4, 16]",
            "model.hidden_size=32",
            "model.moe_intermediate_size=32",
        ),
    ]
    values = load_recipe("nano", keys).to_dict()
    del values["train"]["steps"]
    return Recipe.from_dict({**values, "stages": STAGES})


def poison_sources() -> None:
    """Makes training read targets that nothing predicts in some rows of the last stage."""
    whole = start.open_source

    def open_source(recipe: Recipe):
        source = whole(recipe)
        batch = source.batch

        def poisoned(rows: range, length: int, stage: int = 0) -> Batch:
            read = batch(rows, length, stage)
            if stage == len(STAGES) - 1 and set(rows) & set(POISONED):
                return Batch(read.ids, torch.where(read.targets < 0, read.targets, 255), read.documents)
            return read

        source.batch = poisoned
        return source

    start.open_source = open_source


def attempt(recipe: Recipe, out: Path, lifetime: float | None, writing: bool = False) -> bool:
    """Starts or resumes the run in a fork; False if it was killed after `lifetime` seconds, or then with the next
    checkpoint that it writes.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            start.train(recipe, out, resume=out if (out / "run.json").is_file() else None, shown=False)
            status = 0
        finally:
            os._exit(status)
    if lifetime is not None:
        until = time.monotonic() + lifetime
        while time.monotonic() < until or (writing and not any((out / checkpoint.FOLDER).glob(".writing-*"))):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
    else:
        status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the run in {out} ended with an error")
    return os.WIFEXITED(status)


def records(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(run)]


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs do not have in common."""
    found = []
    one, other = (checkpoint.find(run) for run in (a, b))
    if one.name != other.name or [p.name for p in checkpoint.checkpoints(a)] != [
        p.name for p in checkpoint.checkpoints(b)
    ]:
        found.append("checkpoints")
    for file in ("model", "optimizer", "random"):
        old, new = (load_file(folder / f"{file}.safetensors") for folder in (one, other))
        found += [f"{file}: {name}" for name in old.keys() ^ new.keys()]
        found += [f"{file}: {name}" for name in old.keys() & new.keys() if not torch.equal(old[name], new[name])]
    if checkpoint.read_memory(one).values != checkpoint.read_memory(other).values:
        found.append("memory")
    if records(a) != records(b):
        found.append("metrics")
    if (a / "sample.txt").read_text("utf-8") != (b / "sample.txt").read_text("utf-8"):
        found.append("sample")
    return found


def state(run: Path) -> str:
    """Where a kill hit, as far as the files tell."""
    folder = run / checkpoint.FOLDER
    if not (run / metrics.FILE).is_file():
        return "before the first line"
    if any(folder.glob(".writing-*")):
        return "writing a checkpoint"
    if any(folder.glob(".removing-*")):
        return "removing a checkpoint"
    if not checkpoint.checkpoints(run):
        return "before the first checkpoint"
    last = metrics.read(run)[-1:]
    return "with lines behind the checkpoint" if last and last[0]["step"] > newest(run) else "elsewhere"


def newest(run: Path) -> int:
    return checkpoint.step_of(checkpoint.find(run))


def kill_until_done(recipe: Recipe, out: Path, draw: random.Random, longest: float, most: int) -> list[str]:
    """Runs `recipe` in `out` to its end, killed up to `most` times; where the kills hit."""
    hits: list[str] = []
    while not attempt(recipe, out, draw.uniform(0, longest) if len(hits) < most else None, draw.random() < 1 / 3):
        hits.append(state(out))
    return hits


def experiment(folder: Path, kills: int, seed: int, per_run: int = 1000) -> dict:
    """`kills` kills, over as many runs as they take; raises if a run ends in other bits than the one in one go."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    write_texts(texts)
    poison_sources()
    recipe, draw = make_recipe(texts), random.Random(seed)
    began = time.monotonic()
    attempt(recipe, folder / "whole", None)
    took = time.monotonic() - began
    lines = records(folder / "whole")
    hits: list[str] = []
    runs = 0
    while len(hits) < kills:
        out, runs = folder / f"killed{runs}", runs + 1
        hits += kill_until_done(recipe, out, draw, took / 2, min(per_run, kills - len(hits)))
        found = differences(folder / "whole", out)
        if found:
            raise AssertionError(f"{out} differs from {folder / 'whole'} in {found}, killed {hits}")
        shutil.rmtree(out)
    return {
        "kills": len(hits),
        "runs": runs,
        "steps": len(lines),
        "went_back": [spike for line in lines for spike in line.get("went_back", [])],
        "anticipatory": [line["step"] for line in lines if line.get("anticipatory")],
        "hits": {where: hits.count(where) for where in sorted(set(hits))},
        "seconds_of_a_whole_run": round(took, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills in all (int, default: 100)")
    parser.add_argument("--per-run", type=int, default=12, help="kills of one run at most (int, default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (int, default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(experiment(Path(folder), options.kills, options.seed, options.per_run), indent=1))


if __name__ == "__main__":
    main()
