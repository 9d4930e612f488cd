"""What a model costs in GPU-hours and dollars, from first principles: every figure is a short formula.

    training FLOPs of a token   3 (2 A + mean over positions of index + core)       forward, and twice that backward
    training hours              tokens FLOPs / (peak MFU 3600)
    training memory             16 bytes a parameter (weights, gradients, two moments in float32), and activations
    prefill FLOPs of a token    2 A + mean over positions of index + core
    decode seconds of a token   max(FLOPs / (peak MFU), cache bytes read / bandwidth)
    dollars                     hours price;  per million tokens served: 1e6 seconds / 3600 price

`peak` is the dense BF16 rate of the datasheet, MFU the share of it that is reached; FP8 and FP4 products, which run
faster, are part of that share. MFU is given, never found: `validation` sets it by the published hours of one training
and says how far off it then is on others. A served token shares its weights with a large batch: reading them is not
counted. Of its cache it reads the window, the index keys of all entries, the picked entries, and in HCA layers all.

A activated parameters
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...model.accounting import Account, account, counted, released_entry
from ...model.config import ModelConfig, read_recipe
from ...model.fields import did_you_mean
from ...model.folders import read_json
from ...model.kinds import SPARSE
from ...model.lineage import LineageConfig
from ...model.lineage.accounting import account as lineage_account
from ...model.lineage.accounting import flops as lineage_flops
from ...model.lineage.config import KINDS
from ...model.lineage.config import SHIPPED as LINEAGE
from ..plots.style import canvas, save
from ..recipe import Recipe, load_recipe
from ..run.schedule import Schedule
from .roofline import GPUS, Peak, datasheet

POSITIONS = 256  # at which FLOPs are sampled for a mean over a sequence


class Published(NamedTuple):
    """A training whose H800 hours a report tells, in thousands, and the FLOPs that the formula counts for it."""

    hours: float
    flops: float


# tokens, and tokens of a row (arXiv 2412.19437, table 1 and 4.3); the extension's two phases are published as one
V3_PRETRAINING = (14.8e12, 4096)
V3_EXTENSION = ((1000 * 1920 * 32768, 32768), (1000 * 480 * 131072, 131072))
V3_POST_TRAINING = 5

Config = ModelConfig | LineageConfig


@dataclass(frozen=True)
class Gpu:
    """What computes: dense BF16 FLOPs and bytes a second, the share of the former that is reached, dollars an hour."""

    name: str
    mfu: float
    price: float

    def __post_init__(self) -> None:
        if self.name not in GPUS:
            raise ValueError(f"gpu {self.name!r}:{did_you_mean(self.name, GPUS)} allowed are {', '.join(GPUS)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: allowed are shares above 0, up to 1")
        if not 0 <= self.price < math.inf:
            raise ValueError(f"price={self.price}: allowed are dollars an hour, 0 or more")

    @property
    def peak(self) -> Peak:
        found = datasheet(GPUS[self.name].names[0], "bfloat16")
        assert found is not None
        return found

    @property
    def flops(self) -> float:
        return self.peak.flops * self.mfu

    @property
    def bandwidth(self) -> float:
        return self.peak.bytes


def accounts(config: Config, context: int) -> Account:
    """`account` of either generation."""
    return lineage_account(config, context) if isinstance(config, LineageConfig) else account(config, context)


def attention_flops(config: Config, length: int, *, expanded: bool = False) -> float:
    """Forward FLOPs of index and core of a token, the mean over the positions of a sequence.

    expanded: V3's latent attention with keys and values of all heads, 2 H (n + r + v) a pair, as in training and
    prefill; decoding absorbs, see `model.lineage.attention`.
    """
    if length < 1:
        raise ValueError(f"length={length}: at least one token")
    places = {1 + round(i * (length - 1) / (POSITIONS - 1)) for i in range(POSITIONS)}
    if isinstance(config, LineageConfig):
        parts = [lineage_flops(config, 0, place) for place in places]
        wide = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        narrow = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        shrink = narrow / wide if expanded and not config.sparse else 1.0
        return sum(part.index + shrink * part.core for part in parts) / len(parts)
    parts = [account(config, place).flops for place in places]
    return sum(part.index + part.core for part in parts) / len(parts)


def training_flops(config: Config, length: int) -> float:
    """Of a token in sequences of that length, forward and backward."""
    return 3 * (2 * accounts(config, 0).activated + attention_flops(config, length, expanded=True))


def training_hours(config: Config, tokens: float, length: int, gpu: Gpu) -> float:
    return tokens * training_flops(config, length) / gpu.flops / 3600


def bytes_read(config: Config, context: int) -> float:
    """Cache bytes that decoding one token reads, in the released layout."""
    if isinstance(config, LineageConfig):
        per_token = lineage_account(config, context).cache.per_token / config.num_hidden_layers
        index = (config.index_head_dim or 0) * (1 + 4 / 128)
        keys = min(config.index_topk or context, context) if config.sparse else context
        return config.num_hidden_layers * (keys * (per_token - index) + context * index)
    entry, index_key = released_entry(config)
    total = 0.0
    for kind, ratio in list(zip(config.layer_types, config.compress_ratios))[: config.num_hidden_layers]:
        entries = context // ratio if ratio else 0
        total += entry * min(config.sliding_window, context)
        total += entry * (min(config.index_topk, entries) if kind == SPARSE else entries)
        total += index_key * entries if kind == SPARSE else 0
    return total


def decode_seconds(config: Config, context: int, gpu: Gpu) -> tuple[float, float]:
    """Of one token in a large batch: what its FLOPs take, and what reading its cache takes."""
    return accounts(config, context).flops.total / gpu.flops, bytes_read(config, context) / gpu.bandwidth


def prefill_seconds(config: Config, length: int, gpu: Gpu) -> float:
    """Of one token of a prompt, the mean over its positions."""
    return (2 * accounts(config, 0).activated + attention_flops(config, length, expanded=True)) / gpu.flops


def per_million(seconds: float, gpu: Gpu) -> float:
    """Dollars for a million tokens."""
    return 1e6 * seconds / 3600 * gpu.price


def _dense(activated: float, layers: int, heads: int, pair: int, length: int) -> float:
    """FLOPs of training on a token; `pair`: channels of a key and a value together."""
    return 3 * (2 * activated + layers * 2 * heads * pair * (1 + length) / 2)


def trainings() -> dict[str, Published]:
    """Trainings on H800s of which the hours are published; V3's pre-training first.

    The last two are a trillion tokens each of rows of 4,096 (DeepSeek-V2, arXiv 2405.04434, 3.2.3): a dense model in
    BF16, and a mixture of experts in BF16.
    """
    v3 = LineageConfig.load("v3")
    extension = sum(tokens * training_flops(v3, length) for tokens, length in V3_EXTENSION)
    tokens, length = V3_PRETRAINING
    return {
        "V3's pre-training": Published(2664, tokens * training_flops(v3, length)),
        "V3's context extension": Published(119, extension),
        "DeepSeek 67B, 1e12 tokens": Published(300.6, 1e12 * _dense(67e9, 95, 64, 128 + 128, 4096)),
        "DeepSeek-V2, 1e12 tokens": Published(172.8, 1e12 * _dense(21e9, 60, 128, 192 + 128, 4096)),
    }


def validation() -> tuple[float, dict[str, tuple[float, float]]]:
    """The MFU that the first of `trainings` implies, and of each other one the hours that this predicts and those that
    were published, in thousands.
    """
    (_, first), *others = trainings().items()
    second = Gpu("h800", 1.0, 0).flops * 3.6e6
    mfu = first.flops / second / first.hours
    return mfu, {name: (one.flops / second / mfu, one.hours) for name, one in others}


# tables and the picture ----------------------------------------------------------------------------------------------

RIVALS = {"V3": "v3", "V3.2": "v3.2", "V4-Flash": "v4-flash", "V4-Pro": "v4-pro"}


def load(name: str) -> Config:
    """A configuration of either generation by name, file or folder."""
    if name in LINEAGE:
        return LineageConfig.load(name)
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    kind = read_json(path).get("model_type") if path.suffix == ".json" and path.is_file() else None
    return LineageConfig.load(path) if kind in KINDS else ModelConfig.load(name)


def training(name: str) -> tuple[float, int]:
    """Tokens that a recipe trains on, and the mean length of their rows; V4's pre-training of a configuration.

    Raises:
        ValueError: a recipe whose tokens the model writes.
    """
    if name in LINEAGE or read_recipe(name).keys() == {"model"}:
        return 15e12, 4096
    recipe = load_recipe(name)
    if recipe.rollouts:
        raise ValueError(f"tokens is missing: the model itself writes what {name} trains on")
    return of_recipe(recipe)


def of_recipe(recipe: Recipe) -> tuple[float, int]:
    """Tokens that a recipe trains on, and the mean length of their rows."""
    schedule = Schedule(recipe)
    stages = [(schedule.tokens(i), stage.sequence_length) for i, stage in enumerate(schedule.stages)]
    total = sum(tokens for tokens, _ in stages)
    return total, round(sum(tokens * length for tokens, length in stages) / total)


def comparison(name: str, context: int) -> str:
    """The model beside its relatives: parameters, FLOPs of a token, cache of a sequence."""
    columns = {name: load(name), **{title: load(key) for title, key in RIVALS.items() if key != name}}
    found = {title: accounts(config, context) for title, config in columns.items()}
    rows = {
        "parameters, billion": [f"{a.total / 1e9:,.1f}" for a in found.values()],
        "activated, billion": [f"{a.activated / 1e9:,.2f}" for a in found.values()],
        "GFLOP per token: parameters": [f"{a.flops.parameters / 1e9:,.1f}" for a in found.values()],
        "  index": [f"{a.flops.index / 1e9:,.1f}" for a in found.values()],
        "  attention": [f"{a.flops.core / 1e9:,.1f}" for a in found.values()],
        "  equivalent FP8, of V3.2's": [f"{a.ratios['flops']:.1%}" for a in found.values()],
        "cache, bytes per token": [f"{a.cache.per_token:,.0f}" for a in found.values()],
        "cache, GiB": [f"{a.cache.total / 2**30:,.2f}" for a in found.values()],
        "  growing, of V3.2's": [f"{a.ratios['cache']:.1%}" for a in found.values()],
    }
    lines = [f"at context {context:,}".ljust(32) + "".join(f"{title:>12}" for title in found)]
    return "\n".join(lines + [key.ljust(32) + "".join(f"{value:>12}" for value in row) for key, row in rows.items()])


def estimate(name: str, context: int, gpu: Gpu, tokens: float | None = None, length: int | None = None) -> str:
    """Training and serving in hours and dollars, with the numbers that each formula takes.

    tokens, length: of the training, by default those of `training(name)`.
    """
    if tokens is None or length is None:
        own = training(name)
        tokens, length = own[0] if tokens is None else tokens, own[1] if length is None else length
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens={tokens}: allowed are numbers above 0")
    config = load(name)
    a = accounts(config, context)
    trained = training_flops(config, length)
    hours = training_hours(config, tokens, length, gpu)
    compute, memory = decode_seconds(config, context, gpu)
    prefill = prefill_seconds(config, max(context, 1), gpu)
    lines = [
        f"given      {gpu.name}: {gpu.peak.flops / 1e12:.0f} TFLOP/s dense BF16 at MFU {gpu.mfu:g},"
        f" {gpu.peak.bytes / 1e9:.0f} GB/s, {GPUS[gpu.name].memory:g} GB, ${gpu.price:g} an hour",
        f"training   3 (2 A + attention) = 3 (2 x {_flops(a.activated, 2)} + "
        f"{_flops(attention_flops(config, length, expanded=True), 2)}) = {_flops(trained, 1)}FLOP a token"
        f" in sequences of {length:,}",
        f"           x {tokens:.3g} tokens / ({gpu.flops / 1e12:.0f} TFLOP/s x 3600) = {_duration(hours)},"
        f" {_dollars(hours * gpu.price)}",
        f"           {_memory(a.trainable, GPUS[gpu.name].memory)}",
        f"prefill    {_microseconds(prefill)} a token at {context:,} tokens:"
        f" {_dollars(per_million(prefill, gpu), 3)} per million",
        f"decode     max({_microseconds(compute)} of FLOPs, {_microseconds(memory)} of cache) a token:"
        f" {_dollars(per_million(max(compute, memory), gpu), 3)} per million",
    ]
    return "\n".join(lines)


def _flops(value: float, digits: int) -> str:
    """In G, or in what leaves something before the point."""
    power = max(0, min(3, math.floor(math.log10(max(value, 1)) / 3)))
    return f"{value / 1000**power:.{digits}f} {('', 'k', 'M', 'G')[power]}"


def _duration(hours: float) -> str:
    """Of one GPU, in the unit that says most."""
    if hours >= 1e5:
        return f"{hours / 1e6:.3f} M hours"
    if hours >= 48:
        return f"{hours:,.0f} GPU-hours ({hours / 24:,.1f} days)"
    unit, value = next(
        (unit, hours * 3600 / size)
        for unit, size in (("hour", 3600), ("minute", 60), ("second", 1))
        if hours * 3600 >= 1.5 * size or unit == "second"
    )
    return f"{value:.3g} GPU-{unit}s"


def _dollars(value: float, digits: int = 2) -> str:
    """In millions, dollars or cents."""
    if value >= 1e5:
        return f"${value / 1e6:.2f} M"
    return f"${value:,.{digits}f}" if value >= 0.5 * 10 ** (1 - digits) or not value else f"{100 * value:.2g} cents"


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds >= 5e-8 or not seconds else f"{1e9 * seconds:.2g} ns"


def _memory(parameters: int, gigabytes: float) -> str:
    """What weights, gradients and moments take, without activations."""
    taken = 16 * parameters / 1e9
    size = f"{taken:,.1f} GB" if taken >= 1 else f"{1000 * taken:.0f} MB"
    share = (
        f"{taken / gigabytes:.1%} of a GPU" if taken < gigabytes else f"at least {math.ceil(taken / gigabytes):,} GPUs"
    )
    return f"16 bytes x {counted(parameters)} parameters (weights, gradients, two moments) = {size}, {share}"


def v3_table() -> str:
    """What `validation` finds, with what the MFU was set by."""
    mfu, found = validation()
    (fitted, first), *_ = trainings().items()
    errors = {name: hours / published - 1 for name, (hours, published) in found.items()}
    return "\n".join(
        [
            "thousand H800 hours by the formula of training hours",
            f"calibrated on   {fitted}: {first.hours:,} published, so the MFU is {mfu:.1%} of dense BF16",
            f"predicts        {'':<28}{'hours':>7}{'published':>11}{'off by':>9}",
            *(
                f"                {name:<28}{hours:7,.0f}{published:11,.0f}{errors[name]:+9.0%}"
                for name, (hours, published) in found.items()
            ),
            f"leaves out      V3's post-training ({V3_POST_TRAINING} published)",
            f"One MFU carries over to other trainings within {max(map(abs, errors.values())):.0%} here.",
        ]
    )


def draw(path: Path, name: str, gpu: Gpu) -> Path:
    """Curves over the context: FLOPs of a token, cache of a sequence, dollars per million decoded tokens."""
    columns = {name: load(name), **{title: load(key) for title, key in RIVALS.items() if key != name}}
    contexts = [2**i for i in range(10, 21)]
    figure = canvas(13, 4)
    axes = figure.subplots(1, 3)
    for title, config in columns.items():
        found = [accounts(config, n) for n in contexts]
        dollars = [per_million(max(decode_seconds(config, n, gpu)), gpu) for n in contexts]
        curves: list[list[float]] = [
            [a.flops.total / 1e9 for a in found],
            [a.cache.total / 2**30 for a in found],
            dollars,
        ]
        for axis, values in zip(axes, curves):
            axis.plot(contexts, values, label=title, marker=".", linewidth=1.5)
    titles = ("GFLOP of a decoded token", "GiB of cache of a sequence", f"$ per million decoded tokens, {gpu.name}")
    for axis, title in zip(axes, titles):
        _tidy(axis, title)
    axes[0].legend(frameon=False)
    return save(figure, path, dpi=100)


def _tidy(axis: Any, title: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([2**10, 2**12, 2**14, 2**16, 2**18, 2**20], ["1K", "4K", "16K", "64K", "256K", "1M"])
    axis.set_xlabel("context, tokens")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def count(text: str) -> int:
    """A number of tokens such as 4096, 128K or 1M, in powers of two. Raises ValueError for anything else."""
    factor = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdigit() or len(digits) > 15:
        raise ValueError(f"{text!r} is no number of tokens: allowed are such as 4096, 128K or 1M")
    return int(digits) * factor
