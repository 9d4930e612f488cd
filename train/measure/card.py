"""The model card of an exported checkpoint: README.md in the form of Hugging Face's hub, with curves.png beside it.

Every number is read from the files of the run (run.json, metrics.jsonl, opponents.json, the checkpoint), or follows
from its configuration by `model.accounting` and `cost`, and is then said to be computed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...model.accounting import account
from ...model.disk import write_text
from ...model.interchange import Stored
from ...model.kinds import HEAVY, SLIDING, SPARSE
from ..plots import curves
from ..recipe import Recipe
from ..run import checkpoint, metrics, opponents, provenance
from .cost import of_recipe, training_flops
from .roofline import datasheet

FILE = "README.md"
MARK = "This card is written from the files of the run"
KINDS = {SLIDING: "sliding", SPARSE: "CSA", HEAVY: "HCA"}
PARTS = {"held_out": "held-out bytes", "clean": "clean ones, in no match of 32 bytes or more with training text"}


@dataclass(frozen=True)
class Told:
    """What the files of a run say of one of its checkpoints, and of the folder that it was exported to."""

    run: Path
    recipe: Recipe
    progress: checkpoint.Progress
    stored: Stored

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Those that led to the checkpoint."""
        found = provenance.starts(self.run)
        return [start for start in found if start["step"] < self.progress.step] or found[:1]

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        return metrics.up_to(self.run, self.progress.step)

    @cached_property
    def evaluated(self) -> dict[str, Any]:
        """The last record with bits per byte; empty where there is none."""
        return next((record for record in reversed(self.records) if "held_out" in record), {})

    @cached_property
    def compared(self) -> dict[str, Any]:
        """opponents.json, if it is of this checkpoint."""
        found = opponents.read(self.run)
        return found if found.get("step") == self.progress.step else {}


def write(source: Path, target: Path) -> str:
    """Writes the card of the checkpoint in folder `source`, which was exported to `target`; what came of it, in a line.

    Raises:
        ValueError: a file of the run is broken.
        OSError: the folder cannot be written.
    """
    run, path = checkpoint.run_of(source), target / FILE
    if run is None or not (run / provenance.FILE).is_file():
        return "none: no run of ours made these weights"
    if path.is_file() and MARK not in path.read_text("utf-8", "replace"):
        return f"none: the {FILE} that is there is another's"
    told = Told(run, *checkpoint.read_state(source), Stored(target))
    try:
        picture = curves.plot(run, target / curves.FILE).name if told.records else ""
    except ModuleNotFoundError:  # matplotlib
        picture = ""
    write_text(path, card(told, picture))
    return str(path)


def card(told: Told, picture: str) -> str:
    """The text of the card; `picture` is a file beside it, "" = none."""
    r, a = told.recipe, account(told.recipe.model)
    return f"---\n{_header(told)}---\n\n" + "\n\n".join([
        f"# {r.name}",
        f"A mixture of experts in the architecture of DeepSeek-V4: {a.trainable:,} parameters, of which a token is"
        f" multiplied with {a.activated:,}. Trained by Abyssal on {told.progress.tokens:,} tokens, from"
        f" {_without_folders(r.train.init) or 'new weights'}. {MARK}.",
        *([f"![the run: bits per byte, losses, experts, streams, indexer]({picture})"] if picture else []),
        "## Scores",
        *_scores(told),
        "## Model",
        _table(("", ""), _architecture(told)),
        "## Data",
        _table(("", ""), _data(told)),
        "## Training",
        _table(("", ""), _training(told)),
        "## Use",
        *_use(told),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(told)),
    ]) + "\n"  # fmt: skip


def _header(told: Told) -> str:
    """YAML, whose values may be JSON."""
    source, transformers = _without_folders(told.recipe.data.source), told.stored.layout == "huggingface"
    values: dict[str, Any] = {
        "library_name": "transformers" if transformers else "abyssal",
        "pipeline_tag": "text-generation",
        "tags": ["abyssal", "mixture-of-experts", "sparse-attention"],
    }
    if source.startswith("hf:"):
        values["datasets"] = [source.split(":")[1]]
    if told.evaluated:
        scores = {words: told.evaluated[part] for part, words in PARTS.items() if part in told.evaluated}
        found = [{"type": "bits_per_byte", "name": words, "value": round(bits, 4)} for words, bits in scores.items()]
        data = {"type": source, "name": f"held-out documents of {source}"}
        result = {"task": {"type": "text-generation"}, "dataset": data, "metrics": found}
        values["model-index"] = [{"name": told.recipe.name, "results": [result]}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _scores(told: Told) -> Iterator[str]:
    """Bits per byte beside the opponents'; where there are none, what the last step measured."""
    found, record = told.compared, told.evaluated
    if found:
        sizes = found["bytes"]
        rows = (
            [
                f"**{told.recipe.name}**" if score["name"] == "model" else score["name"],
                f"{found['training'].get(score['training'], 0) / 1e6:,.2f} MB",
                *(f"{score[part]:.4f}" if part in score else "" for part in sizes),
            ]
            for score in found["scores"]
        )
        yield _table(
            ["bits per byte of", "training text", *(f"{n:,} {PARTS[part]}" for part, n in sizes.items())], rows
        )
    elif record:
        scores = {PARTS.get(name, name): record[name] for name in (*PARTS, "trigram") if name in record}
        head = (f"after step {record['step']:,} of {told.progress.step:,}", "bits per byte")
        yield _table(head, ((name, f"{bits:.4f}") for name, bits in scores.items()))
    else:
        last = told.records[-1] if told.records else {}
        numbers = ((name, f"{value:.4g}") for name, value in last.items() if isinstance(value, float))
        yield _table((f"step {told.progress.step:,}", ""), numbers)


def _architecture(told: Told) -> Iterator[tuple[str, str]]:
    c, a, stored = told.recipe.model, account(told.recipe.model), told.stored
    layers = Counter(zip(c.layer_types[: c.num_hidden_layers], c.compress_ratios))
    listed = (f"{n} {KINDS[kind]}{f' of {ratio} tokens an entry' * bool(ratio)}" for (kind, ratio), n in layers.items())
    formats = sorted({header.dtype for header in stored.folder.headers.values()})
    yield "parameters (computed)", f"{a.trainable:,}; without the MTP block {a.trainable - sum(a.mtp.values()):,}"
    yield "activated by a token (computed)", f"{a.activated:,}"
    yield "layers", f"{c.num_hidden_layers}: {', '.join(listed)}; width {c.hidden_size}, {c.hc_mult} residual streams"
    yield "attention", f"{c.num_attention_heads} heads of {c.head_dim}; window of {c.sliding_window} tokens"
    yield "indexer", f"{c.index_n_heads} heads of {c.index_head_dim}, picks {c.index_topk} entries"
    yield (
        "experts",
        f"{c.n_routed_experts} of width {c.moe_intermediate_size}, {c.num_experts_per_tok} a token, beside"
        f" {c.n_shared_experts} shared; {c.num_hash_layers} layers are routed by token id",
    )
    yield "multi-token prediction", "one block" if c.num_nextn_predict_layers else "none"
    yield "Engram", f"{a.parameters['engram tables']:,} values in tables" if c.engram else "none"
    yield "vocabulary, positions", f"{c.vocab_size:,}, {c.max_position_embeddings:,}"
    yield "weights", f"{stored.layout}, {', '.join(formats)}, {stored.folder.nbytes() / 2**20:,.1f} MiB"


def _data(told: Told) -> Iterator[tuple[str, str]]:
    data, told_data = told.recipe.data, told.starts[-1]["data"]
    yield "contents", _without_folders(told_data["contents"])
    yield "digest (SHA-256)", f"`{told_data['digest']}`"
    width = told_data.get("bytes_per_token", 1.0)
    yield "tokenizer", _without_folders(data.tokenizer) + f", {width:.2f} bytes a token of training text" * (width != 1)
    if told.evaluated:
        yield "held out", f"whole documents, {data.held_out_fraction:.1%} of the text, the same for every seed"


def _training(told: Told) -> Iterator[tuple[str, str]]:
    r, progress, start = told.recipe, told.progress, told.starts[-1]
    o, m, machine, code = r.optim, r.model, start["machine"], start["source"]
    memory = max((record["peak_memory_gib"] for record in told.records), default=0.0)
    yield "steps", f"{progress.step:,} of {r.train.steps:,}" + f" in {len(r.stages)} stages" * bool(r.stages)
    yield "tokens", f"{progress.tokens:,}" + f", {r.data.batch_size} rows of a step" * (not r.stages)
    yield "seconds", f"{progress.seconds:,.0f} with evaluations: {progress.tokens / progress.seconds:,.0f} tokens/s"
    if r.grpo is None:
        yield "FLOPs (computed)", _flops_of(told)
    yield (
        "hardware",
        f"{start['processes']} x {machine['name']}, {machine['threads']} threads, {memory:.2f} GiB at most",
    )
    yield "precision", r.train.dtype
    yield (
        "optimizer",
        f"linear maps {o.rule}, embedding and head {o.embedding_rule}, Engram's tables {o.engram_rule}, all else adamw;"
        f" betas {o.betas[0]:g} and {o.betas[1]:g}, momentum {o.momentum:g}, weight decay {o.weight_decay:g}, gradients"
        f" clipped at {o.grad_clip:g}",
    )
    yield (
        "schedule",
        f"learning rate {o.lr:g} after {o.warmup_steps} steps; over the last {o.decay_share:.0%} a cosine down to"
        f" {o.final_lr_share:.0%} of it",
    )
    yield (
        "weights of the losses",
        f"MTP {m.mtp_loss_weight:g}, balance {m.balance_loss_weight:g}, indexer {m.index_loss_weight:g}",
    )
    yield "routers' biases", f"{m.router_bias_rule}, {m.router_bias_update_speed:g}"
    yield "seed", str(r.train.seed)
    yield "versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    dirty = " with uncommitted changes" * bool(code["uncommitted_changes"])
    yield "code", f"commit {code['commit']}{dirty}; digest of the sources `{code['digest']}`"
    yield "began", ", ".join(f"{one['time']} at step {one['step']:,}" for one in told.starts)


def _flops_of(told: Told) -> str:
    start, progress = told.starts[-1], told.progress
    flops = progress.tokens * training_flops(told.recipe.model, of_recipe(told.recipe)[1])
    peak = datasheet(start["machine"]["name"], "bfloat16")
    share = flops / progress.seconds / peak.flops / start["processes"] if peak else 0
    return f"{flops:.3g}" + f", {share:.1%} of the datasheet's dense BF16 rate" * bool(peak)


def _use(told: Told) -> Iterator[str]:
    prompt = json.dumps(told.recipe.train.sample_prompt)
    yield f"`FOLDER` is where this card lies.\n\n```sh\nabyssal generate FOLDER --prompt {prompt}\n```"
    yield '```python\nfrom abyssal.model import load_pretrained\n\nmodel = load_pretrained("FOLDER")\n```'
    if told.stored.layout == "official":
        yield "transformers does not read DeepSeek's names; `abyssal convert FOLDER TARGET` writes those that it does."
        return
    own = "import abyssal.hf  # has the parts that transformers lacks\n" * (told.stored.layout == "abyssal")
    yield (
        f"```python\n{own}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )


def _limits(told: Told) -> Iterator[str]:
    r, step = told.recipe, told.progress.step
    longest = max(r.data.sequence_length, *(stage.sequence_length for stage in r.stages), 0)
    yield "It was scored on held-out parts of its own source alone, and trained with one seed."
    yield f"Rows had at most {longest:,} tokens; what it makes of longer texts is untried."
    if r.chat is None and r.reason is None:
        yield "It continues text. It was not taught to answer, or to follow instructions."
    yield "Nothing was filtered, neither in what it learnt nor in what it writes, and it may repeat training text."
    yield "No license is stated here: that of the training text bears on it."
    if step < r.train.steps:
        yield f"The run was left at step {step:,} of {r.train.steps:,}: its learning rate had not fallen to its end."


def _without_folders(text: str) -> str:
    """Of absolute paths the last part: where files lay is nobody's business."""
    return re.sub(r"(?<!\S)/\S*/", "", text)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
