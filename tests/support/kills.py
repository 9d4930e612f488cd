"""Kills processes at random moments, again and again: is anything lost, torn, or left lying about?

    python tests/support/kills.py 200 [SEED]

training        a small run with everything that must survive: three stages of attention, passes that add up to a step,
                a batch that spikes the loss, the way back from it, experts chosen ahead, evaluations, a checkpoint
                every other step of which two are kept. It ends in the bits of the run in one go
tables          the same with the Engram tables in a file, whose rows are written back
tokenising      byte pairs trained, and a text in their tokens; whatever has its name is whole
mapped          bytes in a file that is mapped
save_pretrained a folder is old or new as a whole, and others' files stay in it
convert         likewise

This process imports torch once and never computes; each attempt is a fork of it that is killed (SIGKILL) after a random
time, wherever it is; a training every third time or so while it writes a checkpoint. A line of JSON for each kind says
what was lost, torn and left after the next start.
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
import traceback
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402 (what an optimizer imports first: not again in each fork)
from safetensors.torch import load_file  # noqa: E402

from abyssal.model import Transformer  # noqa: E402
from abyssal.model.interchange import convert_pretrained, save_pretrained  # noqa: E402
from abyssal.train import start  # noqa: E402
from abyssal.train.data import mapped  # noqa: E402
from abyssal.train.data.corpus import load_corpus  # noqa: E402
from abyssal.train.data.rows import Batch  # noqa: E402
from abyssal.train.data.tokenizers import ByteTokenizer  # noqa: E402
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


def make_recipe(texts: Path, *more: str) -> Recipe:
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
        *more,
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


def linger() -> None:
    """Between the calls that give files their names, where a kill would seldom hit, this process takes its time."""
    for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, partial(late, getattr(os, name)))


def late(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    time.sleep(0.01)
    return call(*arguments, **options)


def attempt(work: Callable[[], Any], lifetime: float | None, ripe: Callable[[], bool] = lambda: True) -> bool:
    """Does `work` in a fork; False if that was killed, after `lifetime` seconds and once the moment is `ripe`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            linger()
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if lifetime is not None:
        until = time.monotonic() + lifetime
        while time.monotonic() < until or not ripe():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.0005)
        else:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
    else:
        status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the work ended with an error")
    return os.WIFEXITED(status)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes in a fork, in one go."""
    began = time.monotonic()
    attempt(work, None)
    return time.monotonic() - began


def go_on(recipe: Recipe, out: Path) -> None:
    start.train(recipe, out, resume=out if (out / "run.json").is_file() else None, shown=False)


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


def hidden(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def kill_run(recipe: Recipe, out: Path, draw: random.Random, longest: float, most: int) -> list[str]:
    """Runs `recipe` in `out` to its end, killed up to `most` times; where the kills hit."""
    hits: list[str] = []
    while True:
        lifetime, written = draw.uniform(0, longest) if len(hits) < most else None, draw.random() < 1 / 3
        ripe = (lambda: any((out / checkpoint.FOLDER).glob(".writing-*"))) if written else (lambda: True)
        if attempt(partial(go_on, recipe, out), lifetime, ripe):
            return hits
        hits.append(state(out))


def kill_training(folder: Path, draw: random.Random, kills: int, keys: tuple[str, ...] = (), per_run: int = 12) -> dict:
    """`kills` kills, over as many runs as they take."""
    recipe = make_recipe(folder.parent / "texts", *keys)
    took = timed(partial(go_on, recipe, folder / "whole"))
    lines, hits, lost, litter = records(folder / "whole"), [], [], []
    while len(hits) < kills:
        out = folder / f"killed{len(hits)}"
        hits += kill_run(recipe, out, draw, took / 2, min(per_run, kills - len(hits)))
        lost += differences(folder / "whole", out)
        litter += hidden(out) + sorted({p.name for p in out.iterdir()} - {p.name for p in (folder / "whole").iterdir()})
        shutil.rmtree(out)
    return {
        **{"kills": len(hits), "lost": lost, "torn": [], "litter": litter},
        "went_back": [spike for line in lines for spike in line.get("went_back", [])],
        "anticipatory": [line["step"] for line in lines if line.get("anticipatory")],
        "hits": {where: hits.count(where) for where in sorted(set(hits))},
    }


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


def kill_tokens(folder: Path, draw: random.Random, kills: int, vocabulary: int | None) -> dict:
    """Kills of those who fill a cache with the tokens of a text: of bytes, or of byte pairs that are trained first."""
    corpus = load_corpus(str(folder.parent / "texts"))
    found: dict[str, Any] = {"kills": 0, "lost": [], "torn": [], "litter": []}

    def fill() -> None:
        mapped.tokenised(corpus, mapped.trained_tokenizer(corpus, vocabulary) if vocabulary else ByteTokenizer())

    def cached(name: str) -> Path:
        os.environ[mapped.CACHE] = str(folder / name)
        return folder / name

    reference = cached("whole")
    took = timed(fill)
    whole = contents(reference)
    while found["kills"] < kills:
        cache = cached("killed")
        while not attempt(fill, draw.uniform(0, took) if found["kills"] < kills else None):
            found["kills"] += 1
            named = {k: v for k, v in contents(cache).items() if not any(part[0] == "." for part in Path(k).parts)}
            found["torn"] += [name for name, digest in named.items() if whole.get(name) != digest]
        found["lost"] += [name for name, digest in whole.items() if contents(cache).get(name) != digest]
        found["litter"] += hidden(cache)
        shutil.rmtree(cache)
    return found


def kill_folders(folder: Path, draw: random.Random, kills: int, write: Callable[[int, Path], None]) -> dict:
    """Kills of those who write model 0 or 1 to a folder, where the other is, and a file of others."""
    found: dict[str, Any] = {"kills": 0, "lost": [], "torn": [], "litter": []}
    whole = []
    for model in (0, 1):
        took = timed(partial(write, model, folder / f"whole{model}"))
        whole.append({**contents(folder / f"whole{model}"), "notes.txt": sha256(b"mine").hexdigest()})
    parent = folder / "killed"
    target = parent / "model"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("mine", "utf-8")
    attempt(partial(write, 0, target), None)
    while found["kills"] < kills:
        model = draw.randrange(2)
        if attempt(partial(write, model, target), draw.uniform(0, took)):
            continue
        found["kills"] += 1
        now = contents(target)
        if now not in whole:
            found["torn" if now else "lost"].append(sorted(now.keys() ^ whole[model].keys()))
        if draw.random() < 1 / 2:
            attempt(partial(write, model, target), None)
            if contents(target) != whole[model]:
                found["lost"].append(sorted(contents(target).keys() ^ whole[model].keys()))
            found["litter"] += sorted(path.name for path in parent.iterdir() if path != target)
            for left in parent.iterdir():  # counted once
                if left != target:
                    shutil.rmtree(left)
    return found


def saving(folder: Path) -> Callable[[int, Path], None]:
    """Writes one of two small models in shards."""
    config = make_recipe(folder.parent / "texts").model
    models = [Transformer(config), Transformer(config)]
    return lambda model, target: save_pretrained(models[model], target, "official", max_shard_size=200_000)


def converting(folder: Path) -> Callable[[int, Path], None]:
    """Writes a small model anew in one of two ways of cutting it into shards."""
    attempt(lambda: saving(folder)(0, folder / "source"), None)
    return lambda model, target: convert_pretrained(
        folder / "source", target, "official", max_shard_size=(300_000, 10**9)[model]
    )


TABLES = ("optim.engram_rows=touched", "train.engram_tables=mapped")
KINDS: dict[str, Callable[[Path, random.Random, int], dict]] = {
    "training": kill_training,
    "tables": partial(kill_training, keys=TABLES),
    "tokenising": partial(kill_tokens, vocabulary=320),
    "mapped": partial(kill_tokens, vocabulary=None),
    "save_pretrained": lambda folder, draw, kills: kill_folders(folder, draw, kills, saving(folder)),
    "convert": lambda folder, draw, kills: kill_folders(folder, draw, kills, converting(folder)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kills", type=int, help="kills in all, of every kind alike (int)")
    parser.add_argument("seed", type=int, nargs="?", default=0, help="of the moments (int, default: 0)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    poison_sources()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "texts").mkdir()
        (Path(folder) / "tmp").mkdir()
        tempfile.tempdir = str(Path(folder) / "tmp")
        write_texts(Path(folder) / "texts")
        for number, kind in enumerate(options.only):
            (Path(folder) / kind).mkdir()
            kills = (options.kills + number) // len(options.only)
            began = time.monotonic()
            found = KINDS[kind](Path(folder) / kind, random.Random(options.seed), kills)
            found["litter"] += os.listdir(tempfile.tempdir)
            wrong += len(found["lost"]) + len(found["torn"]) + len(found["litter"])
            print(json.dumps({"kind": kind, **found, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
