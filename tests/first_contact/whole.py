"""What a user sees: training, decoding, graphs, and where the time goes."""

import gzip
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from runner import ROOT, Context, lines, rows

TEXT = ROOT / "kernels/attention"  # little to read
SMALL = [f"data.source='{TEXT}'", "data.sequence_length=48", "data.batch_size=2", "data.held_out_rows=2"]
SMALL += ["train.device='cpu'"]


def train(at: Context) -> None:
    """`abyssal train small` for a minute: tokens/s, memory, loss."""
    for item in at.items(["train"]):
        _trained(at, item, min(60.0, at.left - 20))


def graphs(at: Context) -> None:
    """Training and decoding as CUDA graphs and without: how fast, and whether the same comes of it."""
    if at.small:
        at.tell(item="graphs", note="not run: they need a GPU")
        return
    for item in at.items(["train graph", "train eager", "decode graph", "decode eager"]):
        graph = item.endswith("graph")
        if item.startswith("train"):
            sets = (f"train.graph={str(graph).lower()}", "train.observe_every=0")
            _trained(at, item, min(15.0, at.left / 3), *sets)
        else:
            _decoded(at, item, batch=1, prompt=1024, new=128, graph=graph)
    at.tell(**compared(at.out))


def compared(out: Path) -> dict[str, Any]:
    """Whether graphs gave what was given without them: the losses of the steps that both made, and the tokens; None
    where one of the two is missing.
    """
    losses = [[step["loss"] for step in lines(out / f"runs/train-{way}/metrics.jsonl")] for way in ("graph", "eager")]
    both = min(map(len, losses))
    written = {row["item"]: row["text"] for row in rows(out, "graphs") if "text" in row}
    tokens = [written.get(f"decode {way}") for way in ("graph", "eager")]
    return {
        "steps_compared": both,
        "same_losses": losses[0][:both] == losses[1][:both] if both else None,
        "same_tokens": None if None in tokens else tokens[0] == tokens[1],
    }


def _trained(at: Context, item: str, seconds: float, *more: str) -> None:
    """A run of that many seconds, of which the metrics stay."""
    from abyssal.train import start
    from abyssal.train.recipe import load_recipe

    recipe, out = "nano" if at.small else "small", at.out / "runs" / item.replace(" ", "-")
    sets = [f"train.minutes={seconds / 60:.4f}", "train.steps=1000000", "train.sample_tokens=0", *more]
    sets += ["train.eval_every=0", "train.checkpoint_every=0", "optim.warmup_steps=20"]
    if at.small:
        sets += [*SMALL, "train.steps=3", "optim.warmup_steps=1"]
    began = time.time()
    start.train(load_recipe(recipe, sets), out)
    shutil.rmtree(out / "checkpoints")
    at.tell(item=item, wall_seconds=time.time() - began, **of_run(out))


def rescue(out: Path) -> None:
    """Tells of runs that were cut off before they could."""
    for folder in sorted((out / "runs").glob("*")):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        item, part = folder.name.replace("-", " "), "train" if folder.name == "train" else "graphs"
        if item not in {row["item"] for row in rows(out, part) if "item" in row}:
            Context(part, out, "", 0.0).tell(item=item, cut=True, **of_run(folder))


def of_run(out: Path) -> dict[str, Any]:
    """Of a run's metrics: its speed when it was warm, its memory and its losses."""
    steps = lines(out / "metrics.jsonl")
    if not steps:
        return {"steps": 0}
    warm = [step["tokens_per_second"] for step in steps[len(steps) // 2 :]]
    return {
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "first_step_seconds": steps[0]["seconds"],
        "tokens_per_second": statistics.median(warm),
        "peak_memory_gib": steps[-1]["peak_memory_gib"],
        "loss_first": steps[0]["loss"],
        "loss_last": statistics.mean(step["loss"] for step in steps[-5:]),
    }


def decode(at: Context) -> None:
    """Tokens/s behind a prompt, one row and eight."""
    for item in at.items(["1 row", "8 rows"]):
        size = {"prompt": 20, "new": 3} if at.small else {"prompt": 1024, "new": 128}
        _decoded(at, item, batch=int(item.split()[0]), **size)


def _decoded(at: Context, item: str, batch: int, prompt: int, new: int, **more: Any) -> None:
    """A new model writes; the second time counts."""
    import torch

    from abyssal.model import ModelConfig, Transformer, generate
    from abyssal.train.measure.profile.steps import to_decode

    with torch.device(at.device):
        model = Transformer(ModelConfig.load("nano" if at.small else "small"))
    model = to_decode(model, torch.float32 if at.small else torch.bfloat16)
    ids = torch.randint(0, 256, (batch, prompt), device=at.device)
    runs = []
    for _ in range(2):
        steps = generate(model, list(ids), max_new_tokens=new, temperature=0.0, stop=(), stream=True, **more)
        written = [list(step) for step in steps]
        stats = steps.stats
        runs.append({
            "prefill_tokens_per_second": stats.prefill_tokens_per_second,
            "tokens_per_second": stats.tokens_per_second,
            "ms_per_token": 1e3 * batch / stats.tokens_per_second,
        })  # fmt: skip
    at.tell(
        item=item, batch=batch, prompt=prompt, new=new, first=runs[0], **runs[1], text=[step[0] for step in written]
    )


def profile(at: Context) -> None:
    """`abyssal profile small`: a training step and a decode step by mechanism."""
    from abyssal.train.measure.profile.run import run

    given: dict[str, Any] = {"repeats": 4}
    if at.small:
        given = {"repeats": 1, "decode_length": 16, "overrides": SMALL}
    path = run("nano" if at.small else "small", device=at.device, out=at.out / "profile", **given)
    for trace in path.parent.glob("trace*.json"):
        with gzip.open(f"{trace}.gz", "wb", compresslevel=3) as file:
            file.write(trace.read_bytes())
        trace.unlink()
    found = json.loads(path.read_text("utf-8"))
    told = {step: found[step]["plain_ms"] for step in ("training", "decode")}
    at.tell(file="profile/profile.json", **told, memory=found["training"]["memory"])
