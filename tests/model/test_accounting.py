"""The account against the published numbers, and against a list of every tensor written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from model_tensors import is_buffer, model_tensors

from abyssal.kernels.engram import engram_primes
from abyssal.model import Transformer
from abyssal.model.accounting import account, cache_bytes, compressor_parameters, v32
from abyssal.model.config import EngramConfig, ModelConfig
from abyssal.model.kinds import HEAVY, SLIDING, SPARSE

FLASH, PRO = ModelConfig.load("v4-flash"), ModelConfig.load("v4-pro")
MILLION, CONTEXT = 10**6, 2**20


def close(value, published, digits):
    """Equal after rounding to the digits that were published."""
    return math.isclose(value, published, abs_tol=0.5 * 10**-digits + 1e-12)


@pytest.mark.parametrize(
    "config, attention, experts, shared, gates, norms, table, total, mtp, mtp_active, activated, digits",
    [
        (FLASH, 5.086, 277.025, 1.082, 0.045, 0.034, 0.530, 284.33, 6.61, 0.32, 13.27, 2),
        (PRO, 19.465, 1547.396, 4.030, 0.168, 0.085, 0.927, 1573.0, 25.84, 0.87, 48.85, 1),
    ],
    ids=["flash", "pro"],
)
def test_released_parameter_counts(
    config, attention, experts, shared, gates, norms, table, total, mtp, mtp_active, activated, digits
):
    got = account(config)
    billions = {name: size / 1e9 for name, size in got.parameters.items()}
    assert close(billions["attention"] + billions["compressor"] + billions["indexer"], attention, 3)
    assert close(billions["routed experts"], experts, 3) and close(billions["shared experts"], shared, 3)
    assert close(billions["gates"], gates, 3)
    assert close(billions["norms"] + billions["hyper-connections"], norms, 3)
    assert close(billions["embedding"], table, 3) and close(billions["head"], table, 3)
    assert close(got.total / 1e9, total, digits)
    assert close(sum(got.mtp.values()) / 1e9, mtp, 2) and close(got.mtp_activated / 1e9, mtp_active, 2)
    assert close(got.activated / 1e9, activated, 2)
    assert got.total_with_mtp == got.total + sum(got.mtp.values())


def test_released_totals_with_mtp():
    assert close(account(FLASH).total_with_mtp / 1e9, 290.94, 2)
    assert close(account(PRO).total_with_mtp / 1e9, 1598.8, 1)


def test_released_cache():
    flash, pro = account(FLASH, CONTEXT).cache, account(PRO, CONTEXT).cache
    assert v32(CONTEXT).cache.per_token == 48_068
    assert flash.per_token == 3_514.25 and close(pro.per_token, 5_031.4, 1)
    for cache, gibibytes, windows in ((flash, 3.43, 3.1), (pro, 4.91, 4.3)):
        assert close(cache.per_token * CONTEXT / 2**30, gibibytes, 2)
        assert int(cache.windows / 2**20 * 10) in (int(windows * 10), int(windows * 10) - 1)
        assert cache.total == cache.per_token * CONTEXT + cache.windows + cache.state
    assert close(v32(CONTEXT).cache.total / 2**30, 46.9, 1)
    assert flash.windows == 43 * 128 * 584 and pro.windows == 61 * 128 * 584
    assert flash.state == 21 * 80 * 1024 + 20 * 512 * 1024


@pytest.mark.parametrize(
    "config, index, core, published, at_2_20",
    [(FLASH, 86.0, 22.6, 114.2, 9.93), (PRO, 122.9, 73.6, 306.6, 26.5)],
    ids=["flash", "pro"],
)
def test_released_flops(config, index, core, published, at_2_20):
    """The published sums take 13 G and 49 G activated parameters; the recount has 13.27 G and 48.85 G."""
    got = account(config, MILLION).flops
    assert close(got.index / 1e9, index, 1) and close(got.core / 1e9, core, 1)
    assert got.parameters == 2 * account(config).activated
    assert got.fp8 == got.parameters + got.index / 2 + 2 * got.core
    assert got.total == got.parameters + got.index + got.core
    rounded = 2e9 * round(account(config).activated / 1e9)
    assert abs((got.fp8 - got.parameters + rounded) / 1e9 - published) < 0.15
    longer = account(config, CONTEXT).flops
    share = (longer.fp8 - longer.parameters + rounded) / v32(CONTEXT).flops.fp8
    assert abs(100 * share - at_2_20) < 0.03


def test_v32_flops():
    got = v32(MILLION).flops
    assert got.parameters == 74e9 and close(got.index / 1e9, 999.4, 1) and close(got.core / 1e9, 34.8, 1)
    assert close(got.fp8 / 1e9, 1143.0, 1)


def test_the_papers_ratios():
    flash, pro = account(FLASH, MILLION).ratios, account(PRO, MILLION).ratios
    assert (round(100 * pro["flops"]), round(100 * pro["cache"])) == (27, 10)
    assert (round(100 * flash["flops"]), round(100 * flash["cache"])) == (10, 7)
    assert close(100 * flash["cache"], 7.31, 2) and close(100 * pro["cache"], 10.47, 2)
    assert close(100 * pro["flops"], 26.8, 1)


SMALL = {
    **{"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 4, "sliding_window": 8},
    **{"compress_ratios": [0, 4, 16, 8], "layer_types": [SLIDING, SPARSE, HEAVY, SPARSE]},
    **{"num_attention_heads": 6, "head_dim": 20, "qk_rope_head_dim": 6, "q_lora_rank": 10, "o_groups": 3},
    **{"o_lora_rank": 7, "index_n_heads": 5, "index_head_dim": 12, "index_topk": 3, "n_routed_experts": 9},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 11, "num_hash_layers": 1, "routed_scaling_factor": 1.0},
}
VARIANTS = {
    "plain": {},
    "one stream": {"hc_mult": 1},
    "two streams": {"hc_mult": 2},
    "no mtp": {"num_nextn_predict_layers": 0},
    "two shared": {"n_shared_experts": 2},
    "all hash": {"num_hash_layers": 4},
    "no hash": {"num_hash_layers": 0},
    "sliding": {"compress_ratios": [0] * 4, "layer_types": []},
    "heavy": {"compress_ratios": [16] * 4, "layer_types": [HEAVY] * 4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_counts_are_those_of_the_tensors(changes):
    check(ModelConfig.from_dict({**SMALL, **changes}))


@pytest.mark.parametrize("name", ["nano", "toy", "small", "long", "v4-flash", "v4-pro"])
def test_counts_of_shipped_configurations(name):
    config, rows = ModelConfig.load(name), {}
    if config.engram:
        e = config.engram
        primes = engram_primes(e.vocab_size, len(e.layers), e.max_ngram, e.heads)
        rows = dict(zip(e.layers, (sum(map(sum, layer)) for layer in primes)))
    check(config, rows)


@pytest.mark.parametrize("kernel", [0, 4])
def test_engram_counts(kernel):
    engram = EngramConfig(layers=(1, 3), head_dim=5, vocab_size=50, heads=2, kernel_size=kernel)
    config = replace(ModelConfig.from_dict(SMALL), engram=engram)
    rows = [sum(map(sum, layer)) for layer in engram_primes(50, 2, 3, 2)]
    got = check(config, dict(zip(engram.layers, rows)))
    plain = account(replace(config, engram=None))
    assert got.parameters["engram tables"] == 5 * sum(rows)
    assert got.activated - plain.activated == got.parameters["engram fusion"]


def check(config, engram_rows=None):
    got = account(config)
    sizes = {name: math.prod(shape) for name, shape in model_tensors(config, engram_rows).items()}
    parameters = {name: size for name, size in sizes.items() if not is_buffer(name)}
    assert got.trainable == sum(parameters.values())
    assert sum(got.mtp.values()) == sum(
        size for name, size in sizes.items() if name.startswith("mtp.") and "tid2eid" not in name
    )
    for buffer, ending in (("gate bias", "gate.bias"), ("tid2eid", "tid2eid"), ("canonical", "engram.canonical")):
        assert got.buffers[buffer] == sum(size for name, size in sizes.items() if name.endswith(ending)), buffer
    assert got.total_with_mtp == got.trainable + got.buffers["gate bias"]
    experts = sum(size for name, size in sizes.items() if ".experts." in name and name.startswith("layers."))
    assert got.parameters["routed experts"] == experts
    mixing = sum(size for name, size in sizes.items() if "hc_" in name and not name.startswith("mtp."))
    assert got.parameters["hyper-connections"] == mixing
    return got


def test_activated_counts_the_chosen_experts_only():
    config = ModelConfig.from_dict(SMALL)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    full = replace(config, num_experts_per_tok=config.n_routed_experts)
    assert account(full).activated - account(config).activated == 4 * 7 * expert
    assert account(full).activated == account(full).total - config.vocab_size * config.hidden_size
    assert account(full).mtp_activated == sum(account(full).mtp.values())


@pytest.mark.parametrize("context", [0, 1, 3, 4, 7, 8, 15, 16, 17, 33, 1000])
def test_attention_reads_what_a_query_sees(context):
    """Counted key by key for the query at the end of the context."""
    config = ModelConfig.from_dict(SMALL)
    t = context - 1
    keys = scored = 0
    for kind, ratio in zip(config.layer_types[:4], config.compress_ratios):
        keys += len(range(max(0, t - config.sliding_window + 1), t + 1))
        visible = [s for s in range(context) if ratio and (s + 1) * ratio <= t + 1]
        keys += min(config.index_topk, len(visible)) if kind == SPARSE else len(visible)
        scored += len(visible) if kind == SPARSE else 0
    got = account(config, context).flops
    assert got.core == keys * 2 * 2 * config.num_attention_heads * config.head_dim
    assert got.index == scored * 2 * config.index_n_heads * config.index_head_dim


def test_plain_cache_counts_values():
    config = ModelConfig.from_dict(SMALL)
    got = account(config, 64, bytes_per_value=4).plain_cache
    entries = {SPARSE: 20 + 12, HEAVY: 20, SLIDING: 0}
    ratios = zip(config.layer_types[:4], config.compress_ratios)
    assert got.per_token * 64 == sum(4 * entries[kind] * 64 // ratio for kind, ratio in ratios if ratio)
    assert got.windows == 4 * 4 * 8 * 20
    half = account(config, 64).plain_cache
    assert config.torch_dtype == "bfloat16" and half.per_token * 2 == got.per_token and half.state == got.state


MEMORY = {"layers": [1, 2], "head_dim": 5, "vocab_size": 50, "heads": 2}
CACHED = {
    **{name: ModelConfig.load(name) for name in ("nano", "toy", "long")},
    "four kinds": ModelConfig.from_dict(SMALL),
    "memory": ModelConfig.from_dict({**SMALL, "engram": {**MEMORY, "kernel_size": 3, "max_ngram": 4}}),
    "memory without convolution": ModelConfig.from_dict({**SMALL, "engram": {**MEMORY, "kernel_size": 0}}),
    "flash": FLASH,
}


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED.keys())
def test_cache_bytes_are_those_of_the_cache(config):
    """At lengths on and around the ratios, with and without rewinding, for every width of a value."""
    with torch.device("meta"):
        model = Transformer(config)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = model.to(dtype)
        for batch, length, rewind in ((1, 1, 0), (3, 3, 0), (2, 4, 7), (1, 127, 2), (2, 128, 0), (2, 1001, 40)):
            cache = model.new_cache(batch, length, rewind=rewind)
            assert cache_bytes(config, batch, length, rewind, bytes_per_value=size) == cache.nbytes()
            if config.num_nextn_predict_layers:
                drafts = model.new_draft_cache(batch, length, rewind=rewind)
                assert cache_bytes(config, batch, length, rewind, size, drafts=True) == drafts.nbytes()


def test_cache_bytes_by_hand():
    """One row of the `long` preset at its full length, float32: 3 windows of 64, CSA entries of 64 + 32, HCA of 64."""
    windows = 3 * (127 + 32) * 64 * 4
    sparse = 2**18 * (64 + 32) * 4 + (7 + 32) * 4 * (64 + 32) * 4
    heavy = 2**13 * 64 * 4 + (127 + 32) * 2 * 64 * 4
    assert cache_bytes(ModelConfig.load("long"), 1, 2**20) == windows + sparse + heavy


def test_entries_are_those_of_the_plain_layout():
    """What grows with the context is `account`'s, value for value."""
    for config in (ModelConfig.from_dict(SMALL), ModelConfig.load("long")):
        grown = cache_bytes(config, 1, 2048) - cache_bytes(config, 1, 1024)
        assert grown == account(config, 1024, bytes_per_value=4).plain_cache.per_token * 1024


def test_context_is_checked():
    with pytest.raises(ValueError, match="context=-1: allowed are token counts >= 0"):
        account(FLASH, -1)


def test_table_prints_the_quoted_numbers():
    text = account(PRO, MILLION).table()
    for words in ("1573.00 B", "48.85 B", "1598.84 B", "26.8%", "10.5%", "5,031.4 B", "context 1,000,000"):
        assert words in text, words
    assert "MTP" not in account(replace(PRO, num_nextn_predict_layers=0)).table()


def test_shipped_sizes_are_what_their_comments_say():
    assert 1e7 < account(ModelConfig.load("toy")).total < 1.1e7
    assert account(ModelConfig.load("toy")).activated < 3e5
    assert 8e7 < account(ModelConfig.load("small")).total_with_mtp < 1.2e8
    assert account(ModelConfig.load("long")).total < 1e6
    nano = account(replace(ModelConfig.load("nano"), engram=None))
    assert 7e5 < nano.total_with_mtp < 1.3e6


def test_compressor_formula_at_released_sizes():
    assert compressor_parameters(4096, 512, 4, overlap=True) == 2 * 1024 * 4096 + 4 * 1024 + 512
    assert compressor_parameters(4096, 512, 128, overlap=False) == 2 * 512 * 4096 + 128 * 512 + 512
