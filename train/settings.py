"""The tables of a recipe beside [model]: every key with its default, its meaning and what is allowed.

always there    [data] [optim] [train] [schedule]
optional        [chat] [planted] [stability] [reason] [grpo] [distil], and [[stages]], one table each
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..model.fields import settle

LOGS = ("tensorboard", "trackio", "wandb")


def key(default: Any, meaning: str, allowed: str = "", check: Any = None) -> Any:
    """A recipe key: its default, one line of meaning, and (in words and as a function) which values are allowed."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed, "check": check})


def _positive(default: Any, meaning: str) -> Any:
    return key(default, meaning, "above 0", lambda value: value > 0)


def _not_negative(default: Any, meaning: str) -> Any:
    return key(default, meaning, "0 or more", lambda value: value >= 0)


def _share(default: float, meaning: str) -> Any:
    return key(default, meaning, "from 0 to 1", lambda value: 0 <= value <= 1)


def _choice(default: str, meaning: str, *others: str) -> Any:
    values = (default, *others)
    return key(default, meaning, f"{', '.join(values[:-1])} or {values[-1]}", lambda value: value in values)


class Table:
    """Checks types and ranges of a table's values at construction. Raises TypeError or ValueError naming the key."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        settle(self, f"{self.name}.")


@dataclass(frozen=True)
class DataConfig(Table):
    """[data]: which text, cut into rows of which length."""

    name = "data"
    source: str = key(
        "stdlib",
        "'stdlib' (Python's own source files, no download), a file, a folder or a glob (text, .jsonl, .parquet),"
        " hf:NAME or hf:NAME:CONFIG (Hugging Face data sets, split train), or planted:TASK"
        " (recall, selective_copy, induction, ngram_facts, mqar, single, multikey, multivalue, tracking, common, ruler;"
        " see [planted])",
        "a name or a path",
        len,
    )
    text_key: str = key("text", "field of a record that is its text; 'content' where there is none of that name")
    tokenizer: str = key(
        "bytes",
        "bytes; bpe:N, byte pairs with a vocabulary of N, trained on the training documents; a folder with the"
        " tokenizer.json of another one (any of the tokenizers library); or init, that of train.init",
    )
    mapped: bool = key(
        False,
        "keep the tokens in a file mapped into memory, for text larger than that; other tokens than bytes always are",
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
    rule: str = _choice(
        "adamw",
        "how linear maps learn: adamw, or muon (orthogonalised momentum; embedding, head, norms and biases stay with"
        " adamw)",
        "muon",
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
    muon_on: str = _choice(
        "all",
        "linear maps that muon takes: all, those of the routed experts, or the rest; others learn by adamw",
        "experts",
        "rest",
    )
    head_wise: bool = key(
        False,
        "whether muon takes each head of the query matrices, each group of the output's first and each half of CSA's"
        " compressor as a matrix of its own (V4.1: for queries and keys)",
    )
    embedding_rule: str = _choice(
        "adamw",
        "how embedding and head learn: adamw, or balanced (V4.1: momentum, rows and columns of equal length, no decay)",
        "balanced",
    )
    engram_rule: str = _choice(
        "adam",
        "how the Engram tables learn: adam (without decay) or balanced (V4.1)",
        "balanced",
    )
    engram_lr_scale: float = _positive(5.0, "learning rate of the Engram tables, as a multiple of the others'")
    engram_rows: str = _choice(
        "all",
        "rows of the Engram tables that a step updates: all, or those looked up (touched: each row by itself, whose"
        " updates do not go on after a look-up; wants an engram_lr_scale about four times as large)",
        "touched",
    )
    grad_clip: float = _not_negative(1.0, "largest norm of the whole gradient; 0 = no limit")


@dataclass(frozen=True)
class TrainConfig(Table):
    """[train]: how long, in which precision, and what is written when."""

    name = "train"
    steps: int = _positive(1000, "optimizer steps; the learning-rate schedule is laid over them")
    minutes: float = _not_negative(0.0, "hard limit of training time, resumed parts included; 0 = none")
    seed: int = _not_negative(0, "of the initial weights and of the order of the data")
    init: str = key(
        "", "run, checkpoint or folder of weights that the run starts from, of the same [model]; '' = new weights"
    )
    prepare: str = key(
        "", "FILE.py:FUNCTION that changes the model as soon as it is built: a mechanism of one's own; '' = none"
    )
    dtype: str = _choice(
        "float32",
        "float32, or bfloat16 by autocast (weights and optimizer stay float32)",
        "bfloat16",
    )
    device: str = key("auto", "auto (cuda if there is one), cpu, cuda, cuda:1, ...")
    engram_tables: str = _choice(
        "resident",
        "where the Engram tables are: resident (with the weights), host (in the host's memory) or mapped (in a file of"
        " the run's folder); the last two read a step's rows ahead of it, and need optim.engram_rows=touched",
        "host",
        "mapped",
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
    graph: bool = key(
        False,
        "capture the steps of a shape in CUDA graphs and replay them: the same bits, launched at once; looks"
        " (observe_every) then need the memory of a step beside the graphs'",
    )
    log_every: int = _positive(
        10,
        "steps between two lines on the screen, where no progress bar is shown; on CUDA also how many steps later the"
        " numbers of a step are looked at, so that none is waited for (with [stability] at once)",
    )
    observe_every: int = _not_negative(
        20, "steps between two looks into the mechanisms (gradients, updates, mHC, indexer, Engram); 0 = none"
    )
    log: tuple[str, ...] = key(
        (),
        "programs that get the metrics too: tensorboard, trackio, wandb",
        f"{', '.join(LOGS)}, each at most once",
        lambda names: len(set(names)) == len(names) and set(names) <= set(LOGS),
    )
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
    attention: str = _choice(
        "sparse",
        "what CSA layers read: sparse, the indexer's picks; dense, all visible entries; warmup, all, and nothing but"
        " the indexer learns, from them",
        "dense",
        "warmup",
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
class ChatConfig(Table):
    """[chat]: present = data.source holds conversations, of which what the assistant wrote is learnt."""

    name = "chat"
    turns: str = _choice(
        "all", "which of the assistant's turns are learnt: all, or the last of each conversation", "last"
    )


@dataclass(frozen=True)
class ReasonConfig(Table):
    """[reason]: generated problems instead of a text; present = the data are conversations about them."""

    name = "reason"
    tasks: tuple[str, ...] = key(
        ("addition-2", "addition-3"),
        "addition-N, sorting-N, multiplication-N, terms-N, countdown-N or draw-N: N digits, letters or numbers",
        "at least one task",
        len,
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
class RolloutConfig(Table):
    """What [grpo] and [distil] have in common: a step is completions of the model's own, and updates on them."""

    prompts: int = _positive(12, "questions of a step; tasks and modes take turns")
    updates: int = _positive(2, "optimizer steps that share out a step's completions")
    temperature: float = _positive(1.0, "of the rollouts")
    keep_routing: bool = key(True, "whether updates take the experts that the rollout chose")
    keep_picks: bool = key(True, "whether updates read the compressed entries that the rollout's indexer picked")
    tokens_per_pass: int = _positive(4096, "padded tokens of a forward and backward pass; completions go by length")


@dataclass(frozen=True)
class GrpoConfig(RolloutConfig):
    """[grpo]: reinforcement learning on the problems of [reason]."""

    name = "grpo"
    group: int = key(8, "completions of each question", "at least 2", lambda size: size >= 2)
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
    keep_sampling_mask: bool = key(True, "whether updates take the tokens that top_k and top_p let through")


@dataclass(frozen=True)
class DistilConfig(RolloutConfig):
    """[distil]: on-policy distillation (V4 5): the policy of a teacher, on what the model itself writes."""

    name = "distil"
    teacher: str = key("", "run or checkpoint whose policy is learnt")


@dataclass(frozen=True)
class PlantedConfig(Table):
    """[planted]: a task with known answers, where data.source is planted:TASK; a task reads some of these keys."""

    name = "planted"
    density: float = key(
        0.0625,
        "answers per token of a row; of selective_copy, per token of an episode's longest distance",
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
    fill: float = key(
        0.5,
        "share of the cells of recall's stretch that hold a pair, while keys suffice",
        "above 0, up to 1",
        lambda x: 0 < x <= 1,
    )
    questions: int = _positive(16, "questions of a row of recall, at most")
    order: int = _positive(2, "tokens that decide the next: of an n-gram, or of the context of induction")
    facts: int = _positive(1000, "n-grams with a known answer")
    zipf: float = _not_negative(1.0, "use of fact r is in proportion to r^-zipf")
    statements: int = _positive(16, "statements of a row of the tasks after RULER, of any length")
    eval_length: int = _not_negative(0, "tokens of a held-out row; 0 = data.sequence_length")
    eval_lengths: tuple[int, ...] = key(
        (), "several eval_length, each scored apart", "none, or numbers above 0", lambda some: all(n > 0 for n in some)
    )
    eval_nearest: int = _not_negative(0, "`nearest` of held-out rows; 0 = nearest")


TABLES = {table.name: table for table in (DataConfig, OptimConfig, TrainConfig, ScheduleConfig)}
OPTIONAL = {
    table.name: table for table in (ChatConfig, PlantedConfig, StabilityConfig, ReasonConfig, GrpoConfig, DistilConfig)
}
STAGES = StageConfig.name
PLANTED = "planted:"  # what the name of a planted source begins with
