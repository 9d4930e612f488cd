"""What a configuration costs: parameters, FLOPs per token and cache bytes, as one pure function of it.

    parameters   by mechanism, exact for any configuration
    FLOPs        2 A + index + core, for one token that sees `context` tokens, itself included
    cache        per_token context + windows + open compression windows, as released;  `cache_bytes`: ours

Quoted against V3.2 at a million tokens these give the published 27 % of the FLOPs and 10 % of the cache (Pro), 10 %
and 7 % (Flash). Sources: V4 2.3, 3.6 and 4.2.1. Nothing here imports torch, unless an Engram's prime table sizes or the
layout of our own cache are needed.

A activated parameters · d hidden · H heads of c (d_r of them rotary) · q query rank · G groups of rank r · m ratio
n streams · E experts of width w · W window · k index_topk · H_I index heads of c_I · L layers
"""

from collections import Counter
from dataclasses import dataclass

from .config import ModelConfig
from .kinds import HEAVY, SLIDING, SPARSE

_NOT_ACTIVATED = ("embedding", "engram tables")  # read by a row, not multiplied


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one token. A multiply-add counts two.

    `parameters` is 2 A, `index` the indexer's query-key products, `core` attention's two products, and `fp8` all of it
    in equivalent FP8 FLOPs: BF16 counts double, FP4 half. V4 runs its index in FP4, V3.2 in FP8, both run attention in
    BF16.
    """

    parameters: float
    index: float
    core: float
    fp8: float

    @property
    def total(self) -> float:
        """The sum without regard to number formats."""
        return self.parameters + self.index + self.core


@dataclass(frozen=True)
class Cache:
    """Bytes that one sequence keeps for decoding.

    `per_token` grows with the context (compressed entries and index keys), `windows` are the last W keys of every
    layer, and `state` the compressors' inputs that no entry holds yet.
    """

    context: int
    per_token: float
    windows: int
    state: int

    @property
    def constant(self) -> int:
        return self.windows + self.state

    @property
    def total(self) -> float:
        return self.per_token * self.context + self.constant


@dataclass(frozen=True)
class Baseline:
    """What V3.2 costs at the same context (V3.2: 61 layers, multi-head latent attention, top-2048 of raw tokens)."""

    flops: Flops
    cache: Cache


@dataclass(frozen=True)
class Account:
    """The costs of one configuration at one context.

    `parameters` are the backbone's by mechanism and `mtp` the MTP block's; both count the gates' bias, as checkpoints
    do. `buffers` are the tensors that this project's model holds as buffers: "gate bias" (counted above), "tid2eid" (a
    hash layer's experts per token id) and "canonical" (Engram's token classes), tables of integers that do not count.
    `activated` and `mtp_activated` are the parameters that one token is multiplied with: the chosen experts only,
    without embedding and Engram tables. `cache` is the released layout, `plain_cache` one of unquantised values.
    """

    context: int
    parameters: dict[str, int]
    mtp: dict[str, int]
    buffers: dict[str, int]
    activated: int
    mtp_activated: int
    flops: Flops
    cache: Cache
    plain_cache: Cache

    @property
    def total(self) -> int:
        """Parameters without the MTP block."""
        return sum(self.parameters.values())

    @property
    def total_with_mtp(self) -> int:
        return self.total + sum(self.mtp.values())

    @property
    def trainable(self) -> int:
        """What `sum(p.numel() for p in model.parameters())` gives: all with MTP, but the gates' bias is a buffer."""
        return self.total_with_mtp - self.buffers["gate bias"]

    @property
    def ratios(self) -> dict[str, float]:
        """Equivalent FP8 FLOPs per token, and growing cache bytes per token, as a share of V3.2's."""
        base = v32(self.context)
        return {"flops": self.flops.fp8 / base.flops.fp8, "cache": self.cache.per_token / base.cache.per_token}

    def table(self) -> str:
        """All of it as lines of text."""
        return "\n".join(f"{name:<34}{value:>14}" if value else name for name, value in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        flops, cache, plain, ratios = self.flops, self.cache, self.plain_cache, self.ratios
        mtp = [("MTP block", counted(sum(self.mtp.values()))), ("total with MTP", counted(self.total_with_mtp))]
        groups = {
            "parameters": [
                *((name, counted(size)) for name, size in self.parameters.items()),
                ("total", counted(self.total)),
                *(mtp if self.mtp else []),
                ("activated per token", counted(self.activated)),
            ],
            f"forward FLOPs of one token at context {self.context:,}": [
                ("parameters", counted(flops.parameters, "G")),
                ("index scores", counted(flops.index, "G")),
                ("attention", counted(flops.core, "G")),
                ("total", counted(flops.total, "G")),
                ("equivalent FP8", counted(flops.fp8, "G")),
                ("share of V3.2's", f"{ratios['flops']:.1%}"),
            ],
            f"cache of one sequence at context {self.context:,}": [
                ("per token, as released", f"{cache.per_token:,.1f} B"),
                ("share of V3.2's", f"{ratios['cache']:.1%}"),
                ("windows", _bytes(cache.windows)),
                ("open compression windows", _bytes(cache.state)),
                ("total", _bytes(cache.total)),
                ("per token, unquantised", f"{plain.per_token:,.1f} B"),
                ("total, unquantised", _bytes(plain.total)),
            ],
        }
        return [row for title, rows in groups.items() for row in ((title, ""), *((f"  {k}", v) for k, v in rows))]


def account(config: ModelConfig, context: int = 0, bytes_per_value: int | None = None) -> Account:
    """Parameters, FLOPs per token and cache bytes of a configuration at a context.

    `bytes_per_value` is the unquantised cache's (default: the size of the configuration's torch_dtype).

    Raises:
        ValueError: `context` is negative.
    """
    if context < 0:
        raise ValueError(f"context={context}: allowed are token counts >= 0")
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    parameters = Counter(_ends(config))
    for layer in range(layers):
        parameters.update(_layer(config, layer))
    parameters.update(_engram(config))
    mtp = Counter(_layer(config, layers) | _mtp_ends(config)) if depth else Counter()
    activated = _activated(config, parameters)
    scored = layers - config.num_hash_layers + depth
    values = bytes_per_value or {"float64": 8, "float32": 4}.get(config.torch_dtype, 2)
    return Account(
        context=context,
        parameters=_listed(parameters),
        mtp=_listed(mtp),
        buffers={
            "gate bias": scored * config.n_routed_experts,
            "tid2eid": config.num_hash_layers * config.vocab_size * config.num_experts_per_tok,
            "canonical": len(config.engram.layers) * config.vocab_size if config.engram else 0,
        },
        activated=activated,
        mtp_activated=_activated(config, mtp),
        flops=_flops(config, activated, context),
        cache=_cache(config, context, *released_entry(config)),
        plain_cache=_cache(config, context, values * config.head_dim, values * config.index_head_dim),
    )


def cache_bytes(
    config: ModelConfig,
    batch_size: int,
    max_length: int,
    rewind: int = 0,
    bytes_per_value: int = 4,
    *,
    drafts: bool = False,
    storage: str = "exact",
) -> int:
    """Bytes that `model.cache.Cache` reserves: what `cache.nbytes()` says, exactly.

    batch_size times the sum over layers of the entries, (max_length // m) (c + c_I) values, and the tails, each of
    (needed + rewind + SLACK) rows: W - 1 needed rows of c values; of (k, z), m - 1 rows of 2 c float32 (HCA) or 2 m - 1
    of 4 c and 4 c_I (CSA), float64 where values are; with Engram of order N, N - 1 int64 ids and (kernel_size - 1) N
    rows of n d values.

    Args:
        bytes_per_value: of the model's parameters.
        drafts: of the MTP block's cache instead (`Transformer.new_draft_cache`).
        storage: "released" holds window keys, entries and index keys in the released formats, 584 and 68 bytes at the
            released sizes, whatever `bytes_per_value` is.

    Raises:
        ValueError: an unknown storage.
    """
    from .cache import SLACK
    from .storage import check_storage

    check_storage(storage)
    entry, index_key = config.head_dim * bytes_per_value, config.index_head_dim * bytes_per_value
    if storage == "released":
        entry, index_key = released_entry(config)

    depth = config.num_hidden_layers
    layers = range(depth, depth + config.num_nextn_predict_layers) if drafts else range(depth)
    spare = rewind + SLACK
    row = sum(_layer_bytes(config, layer, max_length, spare, entry, index_key, bytes_per_value) for layer in layers)
    return batch_size * row


def v32(context: int) -> Baseline:
    """V3.2 at a context: the denominator of the published ratios.

    Cache: 61 (656 + 132) B per token: 512 FP8 values, 4 float32 scales and 64 BF16 rotary values, beside an index key
    of 128 FP8 values and a float32 scale. FLOPs: 2 A with A = 37 G, index 61 · 2 · 64 · 128 · context in FP8, core
    61 · 2 · 128 heads · min(2048, context) · (576 + 512) in BF16 (V3.2, arXiv 2512.02556).
    """
    layers = 61
    weights = 2 * 37e9
    index = layers * 2 * 64 * 128 * context
    core = layers * 2 * 128 * min(2048, context) * (576 + 512)
    cache = Cache(context, per_token=layers * ((512 + 4 * 4 + 2 * 64) + (128 + 4)), windows=0, state=0)
    return Baseline(Flops(weights, index, core, fp8=weights + index + 2 * core), cache)


def attention_parameters(c: ModelConfig) -> int:
    """(d q + q + q H c) + (d c + c) + (H c / G)(G r) + G r d + H: queries, key-value, output, sink (V4 2.3.1)."""
    width, rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    query = c.hidden_size * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * width
    key_value = c.hidden_size * c.head_dim + c.head_dim
    output = width // c.o_groups * rank + rank * c.hidden_size
    return query + key_value + output + c.num_attention_heads


def compressor_parameters(d: int, width: int, ratio: int, overlap: bool) -> int:
    """2 d f c + m f c + c, f = 2 where windows overlap (CSA), else 1: values, gates, slot bias, norm (V4 2.3.1)."""
    channels = width * (2 if overlap else 1)
    return 2 * d * channels + ratio * channels + width


def indexer_parameters(c: ModelConfig, ratio: int) -> int:
    """q H_I c_I + d H_I + its own overlapping compressor of width c_I: queries, head weights, keys (V4 2.3.1)."""
    query = c.q_lora_rank * c.index_n_heads * c.index_head_dim
    keys = compressor_parameters(c.hidden_size, c.index_head_dim, ratio, overlap=True)
    return query + c.hidden_size * c.index_n_heads + keys


def hyper_parameters(c: ModelConfig, sites: int = 2) -> int:
    """Per site (n + 2) n rows of n d + 1, and three scales: pre, post and residual mixing (V4 2.2)."""
    rows = (c.hc_mult + 2) * c.hc_mult
    return sites * (rows * (c.hc_mult * c.hidden_size + 1) + 3)


def engram_sizes(c: ModelConfig) -> tuple[int, int]:
    """Values in all tables, and in everything that fuses them, of all Engram layers.

    Tables: (sum of the primes) head_dim. Fusion per layer, with o = max_ngram - 1 orders: o heads head_dim (n + 1) d
    for keys and value, n d for each of the two norms, and n d (1 + kernel_size) for the convolution and its norm.
    """
    e = c.engram
    if e is None:
        return 0, 0
    from ..kernels.engram import engram_primes

    primes = engram_primes(e.vocab_size, len(e.layers), e.max_ngram, e.heads)
    rows = sum(prime for layer in primes for order in layer for prime in order)
    memory, streams = (e.max_ngram - 1) * e.heads * e.head_dim, c.hc_mult * c.hidden_size
    convolution = streams * (1 + e.kernel_size) if e.kernel_size else 0
    fusion = memory * (streams + c.hidden_size) + 2 * streams + convolution
    return rows * e.head_dim, len(e.layers) * fusion


def _ends(c: ModelConfig) -> dict[str, int]:
    """Embedding, head, the final norm and the final collapse of the streams."""
    table = c.vocab_size * c.hidden_size
    return {"embedding": table, "head": table, "norms": c.hidden_size, "hyper-connections": _collapse(c)}


def _collapse(c: ModelConfig) -> int:
    return c.hc_mult * (c.hc_mult * c.hidden_size + 1) + 1


def _layer(c: ModelConfig, layer: int) -> dict[str, int]:
    """One block's parameters by mechanism."""
    kind, ratio, d = c.layer_kind(layer), c.compress_ratio(layer), c.hidden_size
    compressed = kind != SLIDING
    expert = 3 * d * c.moe_intermediate_size
    bias = 0 if c.is_hash(layer) else c.n_routed_experts
    return {
        "attention": attention_parameters(c),
        "compressor": compressor_parameters(d, c.head_dim, ratio, overlap=kind == SPARSE) if compressed else 0,
        "indexer": indexer_parameters(c, ratio) if kind == SPARSE else 0,
        "routed experts": c.n_routed_experts * expert,
        "shared experts": c.n_shared_experts * expert,
        "gates": c.n_routed_experts * d + bias,
        "norms": 2 * d,
        "hyper-connections": hyper_parameters(c),
    }


def _mtp_ends(c: ModelConfig) -> dict[str, int]:
    """What the MTP block has beyond a layer: two projections, three norms, its own collapse (V4 2.1)."""
    extra = {"projections": 2 * c.hidden_size**2, "norms": 3 * c.hidden_size, "hyper-connections": _collapse(c)}
    layer = _layer(c, c.num_hidden_layers)
    return {name: size + layer.get(name, 0) for name, size in extra.items()}


def _engram(c: ModelConfig) -> dict[str, int]:
    tables, fusion = engram_sizes(c)
    return {"engram tables": tables, "engram fusion": fusion}


def _listed(counts: Counter[str]) -> dict[str, int]:
    return {name: size for name, size in counts.items() if size}


def _activated(c: ModelConfig, counts: Counter[str]) -> int:
    """All parameters less the tables that are only read by a row, less the experts that were not chosen."""
    idle = counts["routed experts"] // c.n_routed_experts * (c.n_routed_experts - c.num_experts_per_tok)
    return counts.total() - idle - sum(counts[name] for name in _NOT_ACTIVATED)


def _flops(c: ModelConfig, activated: int, context: int) -> Flops:
    """2 A;  index 2 H_I c_I (context/m) per CSA layer;  core 4 H c (keys) per layer.

    Keys are min(W, context), and in CSA layers min(k, context/m) entries more, in HCA layers all context/m. Equivalent
    FP8 FLOPs are 2 A + index / 2 + 2 core.
    """
    index = keys = 0
    for kind, ratio in list(zip(c.layer_types, c.compress_ratios))[: c.num_hidden_layers]:
        entries = context // ratio if ratio else 0
        keys += min(c.sliding_window, context) + (min(c.index_topk, entries) if kind == SPARSE else entries)
        index += 2 * c.index_n_heads * c.index_head_dim * entries if kind == SPARSE else 0
    core = 4 * c.num_attention_heads * c.head_dim * keys
    return Flops(2 * activated, index, core, fp8=2 * activated + index / 2 + 2 * core)


def released_entry(c: ModelConfig) -> tuple[int, int]:
    """Bytes of a stored key-value and of an index key in the released layout (584 and 68 at the released sizes).

    c - d_r FP8 values with a scale byte per 64, padded to 8, and d_r BF16 values; index keys are FP4, a scale per 32.
    """
    plain = c.head_dim - c.qk_rope_head_dim
    scales = -(-plain // 64)
    return plain + 2 * c.qk_rope_head_dim + -(-scales // 8) * 8, -(-c.index_head_dim // 2) + -(-c.index_head_dim // 32)


def _cache(c: ModelConfig, context: int, entry: int, index_key: int) -> Cache:
    """Per token (entry + index_key) / m per CSA layer and entry / m per HCA layer; W entries per layer of window.

    Open windows: values and gates in float32, f m rows of f c channels for each compressor (f = 2 in CSA, which also
    keeps the previous window; 1 in HCA).
    """
    per_token, state = 0.0, 0
    for kind, ratio in zip(c.layer_types, c.compress_ratios):
        if kind == SPARSE:
            per_token += (entry + index_key) / ratio
            state += 2 * 4 * (2 * ratio) * 2 * (c.head_dim + c.index_head_dim)
        elif kind == HEAVY:
            per_token += entry / ratio
            state += 2 * 4 * ratio * c.head_dim
    return Cache(context, per_token, windows=c.num_hidden_layers * c.sliding_window * entry, state=state)


def _layer_bytes(
    c: ModelConfig, layer: int, max_length: int, spare: int, entry: int, index_key: int, value: int
) -> int:
    """One row's bytes in one layer; `spare` rows of every tail are for rewinding and growth."""
    kind, ratio = c.layer_kind(layer), c.compress_ratio(layer)
    total = (c.sliding_window - 1 + spare) * entry
    if kind == HEAVY:
        total += max_length // ratio * entry + (ratio - 1 + spare) * 2 * c.head_dim * max(value, 4)
    elif kind == SPARSE:
        width = c.head_dim + c.index_head_dim
        total += max_length // ratio * (entry + index_key) + (2 * ratio - 1 + spare) * 4 * width * max(value, 4)
    if c.engram and layer in c.engram.layers:
        order, taps = c.engram.max_ngram, c.engram.kernel_size
        total += (order - 1 + spare) * 8
        if taps:
            total += ((taps - 1) * order + spare) * c.hc_mult * c.hidden_size * value
    return total


def counted(value: float, billion: str = "B") -> str:
    """A number as people say it: 8.97 M parameters, 1.60 B."""
    return _scaled(value, 1000, ("", "k", "M", billion))


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB"))


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    """The value in the largest of the units that leaves at least 1."""
    power = sum(value >= step**i for i in range(1, len(units)))
    return f"{value / step**power:.{2 if power else 0}f} {units[power]}".rstrip()
