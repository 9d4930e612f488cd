"""A recipe: one TOML file with the tables [model], [data], [optim] and [train] that says all of a training run.

A run that learns a generated task has [reason] too, and one that learns it from rewards [grpo]. [schedule] says what
changes on the way, [[stages]] that a run has several (train.steps is their sum then), [stability] that it looks out for
spikes of the loss.

    recipe = load_recipe("toy", ["optim.lr=1e-3", "train.steps=200"])

Keys of [model] are those of `ModelConfig`; the other three tables are the dataclasses below, every key with its default
and its meaning. An unknown key is an error that names the nearest one.
"""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args, get_origin

from ..model.config import ModelConfig, read_recipe
from .data.tokenizers import BOS, SPECIAL_TOKENS, bpe_size


def key(default: Any, meaning: str, allowed: str = "", check: Any = None) -> Any:
    """A recipe key: its default, one line of meaning, and (in words and as a function) which values are allowed."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed, "check": check})


def _positive(default: Any, meaning: str) -> Any:
    return key(default, meaning, "above 0", lambda value: value > 0)


def _not_negative(default: Any, meaning: str) -> Any:
    return key(default, meaning, "0 or more", lambda value: value >= 0)


def _share(default: float, meaning: str) -> Any:
    return key(default, meaning, "from 0 to 1", lambda value: 0 <= value <= 1)


class Table:
    """Checks types and ranges of a table's values at construction. Raises TypeError or ValueError naming the key."""

    name = ""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value = _typed(f"{self.name}.{f.name}", getattr(self, f.name), f.type)
            object.__setattr__(self, f.name, value)
            if f.metadata["check"] and not f.metadata["check"](value):
                raise ValueError(f"{self.name}.{f.name}={value!r}: allowed is {f.metadata['allowed']}")


@dataclass(frozen=True)
class DataConfig(Table):
    """[data]: which text, cut into rows of which length."""

    name = "data"
    source: str = key(
        "stdlib",
        "'stdlib' (Python's own source files, no download), a folder of text files, a file, or planted:TASK"
        " (recall, selective_copy, induction, ngram_facts; see [planted])",
    )
    tokenizer: str = key(
        "bytes",
        "bytes; bpe:N, byte pairs with a vocabulary of N, trained on the training documents; or the folder of a trained"
        " tokenizer",
    )
    mapped: bool = key(
        False,
        "keep the tokens in a file mapped into memory, for text larger than that; a trained tokenizer always does",
    )
    sequence_length: int = _positive(512, "tokens of a row")
    batch_size: int = _positive(8, "rows of a step")
    held_out_fraction: float = key(
        0.05, "share of the text that is never trained on", "between 0 and 1", lambda value: 0 < value < 1
    )
    held_out_rows: int = _not_negative(128, "held-out rows that an evaluation reads, evenly spaced; 0 = all")


@dataclass(frozen=True)
class OptimConfig(Table):
    """[optim]: the rules of the parameters (V4 2.4) and the learning rate: linear warm-up, constant, cosine tail (V4
    4.2.2).
    """

    name = "optim"
    rule: str = key(
        "adamw",
        "how linear maps learn: adamw, or muon (orthogonalised momentum; embedding, head, norms and biases stay with"
        " adamw)",
        "adamw or muon",
        lambda value: value in ("adamw", "muon"),
    )
    lr: float = _positive(2e-3, "peak learning rate")
    final_lr_share: float = _share(0.1, "learning rate of the last step, as a share of the peak")
    warmup_steps: int = _not_negative(100, "steps of the linear warm-up")
    decay_share: float = _share(0.4, "share of the steps, at the end, over which the cosine tail falls")
    betas: tuple[float, float] = key(
        (0.9, 0.95), "decay of the two moments", "two numbers in [0, 1)", lambda pair: all(0 <= b < 1 for b in pair)
    )
    eps: float = _positive(1e-20, "added to the root of the second moment")
    weight_decay: float = _not_negative(0.1, "decoupled weight decay of matrices (not of embeddings, norms, biases)")
    momentum: float = key(
        0.95, "decay of the momentum of muon and of the balanced rule", "0 or more, below 1", lambda v: 0 <= v < 1
    )
    update_scale: float = _positive(
        0.18, "root mean square of an update of muon or of the balanced rule, as a multiple of the learning rate"
    )
    head_wise: bool = key(
        False,
        "whether muon takes each head of the query matrices, each group of the output's first and each half of CSA's"
        " compressor as a matrix of its own (V4.1: for queries and keys)",
    )
    embedding_rule: str = key(
        "adamw",
        "how embedding and head learn: adamw, or balanced (V4.1: momentum, rows and columns of equal length, no decay)",
        "adamw or balanced",
        lambda value: value in ("adamw", "balanced"),
    )
    engram_rule: str = key(
        "adam",
        "how the Engram tables learn: adam (without decay) or balanced (V4.1)",
        "adam or balanced",
        lambda value: value in ("adam", "balanced"),
    )
    engram_lr_scale: float = _positive(5.0, "learning rate of the Engram tables, as a multiple of the others'")
    engram_rows: str = key(
        "all",
        "rows of the Engram tables that a step updates: all, or those looked up (touched: each row by itself, whose"
        " updates do not go on after a look-up; wants an engram_lr_scale about four times as large)",
        "all or touched",
        lambda value: value in ("all", "touched"),
    )
    grad_clip: float = _not_negative(1.0, "largest norm of the whole gradient; 0 = no limit")


@dataclass(frozen=True)
class TrainConfig(Table):
    """[train]: how long, in which precision, and what is written when."""

    name = "train"
    steps: int = _positive(1000, "optimizer steps; the learning-rate schedule is laid over them")
    minutes: float = _not_negative(0.0, "hard limit of training time, resumed parts included; 0 = none")
    seed: int = _not_negative(0, "of the initial weights and of the order of the data")
    init: str = key("", "run or checkpoint whose weights the run starts from, of the same [model]; '' = new weights")
    dtype: str = key(
        "float32",
        "float32, or bfloat16 by autocast (weights and optimizer stay float32)",
        "float32 or bfloat16",
        lambda value: value in ("float32", "bfloat16"),
    )
    device: str = key("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    engram_tables: str = key(
        "resident",
        "where the Engram tables are: resident (with the weights), host (in the host's memory) or mapped (in a file of"
        " the run's folder); the last two read a step's rows ahead of it, and need optim.engram_rows=touched",
        "resident, host or mapped",
        lambda value: value in ("resident", "host", "mapped"),
    )
    micro_batch: int = _not_negative(
        0, "rows of a forward and backward pass, whose gradients add up to those of the step; 0 = all rows at once"
    )
    expert_parallel: int = _positive(
        1, "processes, of those that torchrun starts, that share out the experts of each layer; divides their number"
    )
    process_timeout: float = _positive(600.0, "seconds that the processes of a run wait for one another before it ends")
    recompute: int = _not_negative(
        0, "layers of a group that is worked out again in the backward pass, which saves memory; 0 = none"
    )
    log_every: int = _positive(10, "steps between two lines on the screen, where no progress bar is shown")
    observe_every: int = _not_negative(
        20, "steps between two looks into the mechanisms (gradients, updates, mHC, indexer, Engram); 0 = none"
    )
    tensorboard: bool = key(False, "also write the metrics for TensorBoard")
    eval_every: int = _not_negative(100, "steps between two evaluations on held-out text; 0 = at the end only")
    checkpoint_every: int = _not_negative(200, "steps between two checkpoints; 0 = at the end only")
    keep: int = _positive(2, "checkpoints that are kept")
    sample_tokens: int = _not_negative(256, "length of the text written at the end; 0 = none")
    sample_prompt: str = key("def ", "text that the sample continues")


@dataclass(frozen=True)
class ScheduleConfig(Table):
    """[schedule]: what changes in the course of a run beside the learning rate (V4 4.2.2); by default nothing."""

    name = "schedule"
    batch_start: int = _positive(1, "rows of the first step, where the batch is ramped up")
    batch_ramp_steps: int = _not_negative(
        0, "steps over which the rows grow, linearly and in multiples of batch_start, to the batch size; 0 = no ramp"
    )
    mtp_final_share: float = _share(
        1.0, "share of model.mtp_loss_weight that is left once the learning rate falls (V4: a third)"
    )
    bias_rest_share: float = _share(
        0.0,
        "share of the steps, at the end, in which router biases rest (V3: 0.034, the last 500 B of 14.8 T tokens)",
    )


@dataclass(frozen=True)
class StageConfig(Table):
    """[[stages]]: one stage of a run (V4 4.2.2: 4K, 16K, 64K and 1M tokens; dense, indexer warm-up, sparse)."""

    name = "stages"
    steps: int = _positive(1, "optimizer steps of the stage")
    sequence_length: int = _not_negative(0, "tokens of a row; 0 = data.sequence_length")
    batch_size: int = _not_negative(0, "rows of a step; 0 = data.batch_size")
    attention: str = key(
        "sparse",
        "what CSA layers read: sparse, the indexer's picks; dense, all visible entries; warmup, all, and nothing but"
        " the indexer learns, from them",
        "dense, warmup or sparse",
        lambda value: value in ("dense", "warmup", "sparse"),
    )
    lr: float = _not_negative(0.0, "peak learning rate in this stage; 0 = optim.lr")


@dataclass(frozen=True)
class StabilityConfig(Table):
    """[stability]: present = a spike of the loss takes the run back to a checkpoint (V4 4.2.3). All numbers are our
    choice: the report gives none.
    """

    name = "stability"
    window: int = key(64, "losses before a step that it is compared with", "at least 4", lambda value: value >= 4)
    deviations: float = _positive(
        8.0, "a spike is a loss above the window's median by more than this many deviations (1.4826 x the median one)"
    )
    least: float = _positive(0.25, "and by more than this many nats, however even the losses before")
    anticipatory_steps: int = _positive(
        100, "steps after the spike's own until which experts are chosen by earlier weights"
    )
    lag: int = _positive(4, "steps between the weights that choose the experts and those that use them")


@dataclass(frozen=True)
class ReasonConfig(Table):
    """[reason]: generated problems instead of a text; present = the data are conversations about them."""

    name = "reason"
    tasks: tuple[str, ...] = key(
        ("addition-2", "addition-3"), "addition-N or sorting-N, N digits or letters", "at least one task", len
    )
    modes: tuple[str, ...] = key(
        ("thinking", "chat"),
        "with visible working, or the answer at once; every problem is seen in each mode",
        "thinking and chat, each at most once",
        lambda modes: modes and len(set(modes)) == len(modes) and set(modes) <= {"thinking", "chat"},
    )
    exam_problems: int = _positive(64, "held-out problems of each task that an evaluation asks in each mode")
    max_new_tokens: int = _positive(64, "longest completion; a longer one is cut off, and so is wrong")


@dataclass(frozen=True)
class GrpoConfig(Table):
    """[grpo]: reinforcement learning on the problems of [reason]; present = steps are rollouts and updates."""

    name = "grpo"
    prompts: int = _positive(12, "questions of a step; tasks and modes take turns")
    group: int = key(8, "completions of each question", "at least 2", lambda size: size >= 2)
    updates: int = _positive(2, "optimizer steps that share out a step's completions")
    temperature: float = _positive(1.0, "of the rollouts")
    top_k: int = _not_negative(0, "rollouts draw from the k likeliest tokens; 0 = all")
    top_p: float = key(
        1.0, "rollouts draw from the likeliest tokens of this mass; 1 = all", "above 0 up to 1", lambda p: 0 < p <= 1
    )
    clip_low: float = _share(0.2, "how far below 1 the ratio of new to old probability may pay")
    clip_high: float = _not_negative(0.28, "how far above 1 it may pay")
    kl_weight: float = _not_negative(0.01, "weight of the KL to the weights the run started from; 0 = none")
    off_policy_limit: float = _positive(
        0.5, "log(old / new), nats per token, above which a completion worse than its group's mean is left out"
    )
    skip_settled: bool = key(True, "whether updates leave out groups all right or all wrong, which have no advantage")
    keep_routing: bool = key(True, "whether updates take the experts that the rollout chose")
    keep_sampling_mask: bool = key(True, "whether updates take the tokens that top_k and top_p let through")
    tokens_per_pass: int = _positive(4096, "padded tokens of a forward and backward pass; completions go by length")


@dataclass(frozen=True)
class PlantedConfig(Table):
    """[planted]: a task with known answers, where data.source is planted:TASK; a task reads some of these keys."""

    name = "planted"
    density: float = key(
        0.0625,
        "answers per token of a row, as far as they find a place",
        "above 0, at most 0.5",
        lambda x: 0 < x <= 0.5,
    )
    nearest: int = _positive(1, "least number of tokens from the evidence to the question")
    farthest: int = _not_negative(
        0, "largest number of tokens from the evidence to the question; 0 = what a row allows"
    )
    keys: int = key(64, "different keys", "2 or more", lambda count: count >= 2)
    values: int = key(64, "different values, or items, or tokens of induction", "2 or more", lambda count: count >= 2)
    fillers: int = _positive(1, "different tokens that mean nothing")
    questions: str = key(
        "spread",
        "where recall asks: spread over the row, or all at its end",
        "spread or end",
        lambda value: value in ("spread", "end"),
    )
    order: int = _positive(2, "tokens that decide the next: of an n-gram, or of the context of induction")
    facts: int = _positive(1000, "n-grams with a known answer")
    zipf: float = _not_negative(1.0, "use of fact r is in proportion to r^-zipf")
    eval_length: int = _not_negative(0, "tokens of a held-out row; 0 = data.sequence_length")


TABLES = {table.name: table for table in (DataConfig, OptimConfig, TrainConfig, ScheduleConfig)}
OPTIONAL = {table.name: table for table in (PlantedConfig, StabilityConfig, ReasonConfig, GrpoConfig)}
STAGES = StageConfig.name
PLANTED = "planted:"  # what the name of a planted source begins with


@dataclass(frozen=True)
class Recipe:
    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    stages: tuple[StageConfig, ...] = ()
    planted: PlantedConfig | None = None
    stability: StabilityConfig | None = None
    reason: ReasonConfig | None = None
    grpo: GrpoConfig | None = None

    def __post_init__(self) -> None:
        _check_schedule(self)
        _check_data(self)
        if self.grpo and not self.reason:
            raise ValueError("[grpo] without [reason]: rewards need problems with known answers")
        if self.train.engram_tables != "resident" and self.optim.engram_rows != "touched":
            where = f"train.engram_tables={self.train.engram_tables!r}"
            raise ValueError(f"{where}: allowed with optim.engram_rows='touched' only: other updates read every row")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `Recipe.from_dict` of it is equal."""
        present = [name for name in (*TABLES, *OPTIONAL) if getattr(self, name) is not None]
        tables = {name: {k: _plain(v) for k, v in asdict(getattr(self, name)).items()} for name in present}
        stages = {STAGES: [asdict(stage) for stage in self.stages]} if self.stages else {}
        return {"name": self.name, "model": self.model.to_dict(), **tables, **stages}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Raises ValueError for an unknown table or key (names the nearest), a missing [model], or a bad value."""
        for table in values:
            if table not in ("name", "model", STAGES, *TABLES, *OPTIONAL):
                nearest = _nearest(table, (STAGES, *TABLES, *OPTIONAL))
                raise ValueError(f"unknown table [{table}]: the nearest known one is [{nearest}]")
        if "model" not in values:
            raise ValueError(f"recipe {values.get('name', '')!r} has no table [model]")
        tables = {name: _table(kind, values.get(name, {})) for name, kind in TABLES.items()}
        tables |= {name: _table(kind, values[name]) for name, kind in OPTIONAL.items() if name in values}
        if STAGES in values:
            tables[STAGES] = _stages(values[STAGES])
            if "steps" not in values.get("train", {}):
                tables["train"] = replace(tables["train"], steps=sum(stage.steps for stage in tables[STAGES]))
        return cls(values.get("name", "unnamed"), ModelConfig.from_dict(values["model"]), **tables)


def _check_data(recipe: Recipe) -> None:
    """The tokens of the data fit into the model's vocabulary, and [planted] belongs to a planted source."""
    model, source = recipe.model, recipe.data.source
    if source.startswith(PLANTED):
        from .data.planted.source import planted_task

        least = planted_task(source, recipe.planted or PlantedConfig()).vocabulary
        if model.vocab_size < least:
            raise ValueError(f"model.vocab_size={model.vocab_size}: allowed is at least {least}, for {source}")
        if not recipe.data.held_out_rows:
            raise ValueError(f"data.held_out_rows=0: allowed is 1 or more: the rows of {source} never end")
        return
    if recipe.planted:
        raise ValueError(f"[planted] is for sources that begin with {PLANTED!r}: data.source={source!r}")
    size = bpe_size(recipe.data.tokenizer)
    if recipe.reason and recipe.data.tokenizer != "bytes":
        raise ValueError(f"data.tokenizer={recipe.data.tokenizer!r}: allowed with [reason] is bytes")
    if recipe.data.tokenizer != "bytes" and size is None:
        return  # a path: what is there is checked when it is read
    check_vocabulary(model, recipe.data.tokenizer, BOS if size is None else size - SPECIAL_TOKENS)


def check_vocabulary(model: ModelConfig, tokenizer: str, bos: int) -> None:
    """Raises ValueError unless the model has room for a tokenizer's tokens of text and its bos, and the same bos."""
    named = f"for data.tokenizer={tokenizer!r}"
    if model.vocab_size <= bos:
        raise ValueError(
            f"model.vocab_size={model.vocab_size}: allowed is at least {bos + 1} (tokens of text and bos), {named}"
        )
    if model.bos_token_id != bos:
        special = f"eos_token_id is {bos + 1}, pad_token_id {bos + 2}"
        raise ValueError(f"model.bos_token_id={model.bos_token_id}: allowed is {bos}, {named} ({special})")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a .toml file, with `table.key=value` overrides laid over it.

    Raises:
        ValueError: no such recipe, an override that is not `table.key=value`, an unknown key, or a bad value.
    """
    values = read_recipe(name_or_path)
    return Recipe.from_dict(apply({"name": Path(name_or_path).stem, **values}, overrides))


def apply(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with `a.b.c=value` set for each override; values are read as TOML, a bare word as a string."""
    result = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        names = path.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            raise ValueError(f"--set {override!r}: allowed is table.key=value, for example optim.lr=1e-3")
        if names[0] not in ("model", STAGES, *TABLES, *OPTIONAL):
            nearest = _nearest(names[0], ("model", STAGES, *TABLES, *OPTIONAL))
            raise ValueError(f"--set {override!r}: unknown table {names[0]!r}: the nearest known one is {nearest!r}")
        table = result
        for name in names[:-1]:
            table = _within(override, table, name)
        if not isinstance(table, dict):
            raise ValueError(f"--set {override!r}: {names[-2]!r} is a list: allowed is {names[-2]}.0.key=value")
        table[names[-1]] = _parse(text.strip())
    return result


def _within(override: str, table: Any, name: str) -> Any:
    """The table or list of tables `name` of a table, made if it is missing, or the table of that number of a list."""
    if isinstance(table, list):
        if not name.isdigit() or int(name) >= len(table):
            raise ValueError(f"--set {override!r}: {name!r}: allowed are 0 to {len(table) - 1}")
        return table[int(name)]
    inner = table.setdefault(name, {})
    if not isinstance(inner, dict | list):
        raise ValueError(f"--set {override!r}: {name!r} is a value, not a table")
    return inner


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`table.key: old -> new` for every key that differs (names of recipes aside)."""
    before, after = old.to_dict(), new.to_dict()
    found = []
    for table in ("model", *TABLES, *OPTIONAL):
        ours, theirs = before.get(table, {}), after.get(table, {})
        for name in sorted({*ours, *theirs}):
            a, b = ours.get(name), theirs.get(name)
            if a != b:
                found.append(f"{table}.{name}: {a!r} -> {b!r}")
    if before.get(STAGES) != after.get(STAGES):
        found.append(f"{STAGES}: {before.get(STAGES, [])} -> {after.get(STAGES, [])}")
    return found


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _table(kind: type, values: Any) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.name}={values!r}: allowed is a table [{kind.name}]")  # type: ignore[attr-defined]
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            table = kind.name  # type: ignore[attr-defined]
            raise ValueError(
                f"unknown key '{table}.{name}': the nearest known key is '{table}.{_nearest(name, names)}'"
            )
    return kind(**values)


def _nearest(name: str, known: Any) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the annotated type: whole numbers pass as float, lists as tuples, nothing else changes."""
    if get_origin(kind) is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name}={value!r}: allowed is a list of {items[0].__name__}")
            items = (items[0],) * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise TypeError(f"{name}={value!r}: allowed is a list of {len(items)} numbers")
        return tuple(_typed(name, item, kind) for item, kind in zip(value, items))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise TypeError(f"{name}={value!r}: allowed is {kind.__name__}, not {type(value).__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: allowed are finite numbers")
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) for name, value in values.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _copy(value)
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _stages(values: Any) -> tuple[StageConfig, ...]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{STAGES}={values!r}: allowed are one or more tables [[{STAGES}]]")
    return tuple(_table(StageConfig, value) for value in values)


def _check_schedule(recipe: Recipe) -> None:
    """That stages, ramp and model fit together."""
    stages, ramp, steps = recipe.stages, recipe.schedule, recipe.train.steps
    total = sum(stage.steps for stage in stages)
    if stages and steps != total:
        raise ValueError(f"train.steps={steps}: allowed is {total}, the sum of the stages (or leave it out)")
    starts = accumulate((stage.steps for stage in stages), initial=0)
    ramped = [stage for first, stage in zip(starts, stages) if first < ramp.batch_ramp_steps]
    sizes = [stage.batch_size or recipe.data.batch_size for stage in ramped] or [recipe.data.batch_size]
    if ramp.batch_ramp_steps and ramp.batch_start > min(sizes):
        raise ValueError(f"schedule.batch_start={ramp.batch_start}: allowed are 1 to {min(sizes)}, the ramp's batch")
    sparse = "compressed_sparse_attention" in recipe.model.layer_types
    for number, stage in enumerate(stages):
        if stage.attention == "warmup" and not sparse:
            raise ValueError(f"stages.{number}.attention='warmup': allowed where the model has a CSA layer to teach")
    for table in ("stability", STAGES):
        if recipe.grpo and getattr(recipe, table):
            raise ValueError(f"[{table}] beside [grpo]: allowed is one of them")
