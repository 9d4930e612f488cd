"""A prompt in chunks: the same logits for every chunk, memory that does not grow, errors that change nothing."""

import pytest
import torch
from live_bytes import LiveBytes
from lively import draw_ids, lively
from oracle import assert_same

from abyssal.model import ModelConfig
from abyssal.model.generation.prefill import LARGEST, bytes_per_token, chunk_tokens, prefill


def peak_bytes(model, tokens, batch=1, **options):
    cache = model.new_cache(batch, tokens)
    ids = draw_ids(batch, tokens)
    with LiveBytes() as live:
        prefill(model, ids, cache, **options)
    return live.peak


@pytest.fixture(scope="module")
def model():
    return lively(num_hidden_layers=3, compress_ratios=[0, 4, 16])


@pytest.mark.parametrize("chunk", [1, 7, 16, 39, 1000, None])
def test_any_chunk_gives_the_same_logits_and_cache(model, chunk):
    ids = draw_ids(2, 40)
    cache = model.new_cache(2, 41)
    out = prefill(model, ids, cache, chunk=chunk, keep_streams=16)
    assert_same("logits", out.logits, model(ids).logits[:, -1:], 1e-5)
    whole = model.new_cache(2, 41)
    assert_same("streams", out.streams, model(ids, cache=whole).streams[:, -16:], 1e-5)
    after = draw_ids(2, 1, seed=1)
    assert_same("next logits", model(after, cache=cache).logits, model(after, cache=whole).logits, 1e-5)


def test_streams_of_a_prompt_shorter_than_wanted(model):
    out = prefill(model, draw_ids(1, 5), model.new_cache(1, 5), chunk=2, keep_streams=16)
    assert out.streams.shape == (1, 5, 4, 64)
    assert prefill(model, draw_ids(1, 5), model.new_cache(1, 5)).streams is None


@pytest.mark.parametrize("chunk", [1, 20, None])
@pytest.mark.parametrize("lengths", [(22, 3, 17, 21), (5, 22, 1, 22), (9, 9, 9, 9)])
def test_ragged_rows_give_the_logits_of_their_last_real_token(model, lengths, chunk):
    ids = draw_ids(4, 25)  # four columns that are nobody's
    cache = model.new_cache(4, 25)
    out = prefill(model, ids, cache, lengths, chunk=chunk)
    want = torch.cat([model(ids[i : i + 1, :n]).logits[:, -1:] for i, n in enumerate(lengths)])
    assert_same("logits", out.logits, want, 1e-5)
    assert cache.lengths.tolist() == list(lengths)


def test_continues_what_the_cache_holds(model):
    ids, cache = draw_ids(1, 90), model.new_cache(1, 90)
    prefill(model, ids[:, :37], cache, chunk=10)
    assert_same("logits", prefill(model, ids[:, 37:], cache, chunk=20).logits, model(ids).logits[:, -1:], 1e-5)


@pytest.mark.parametrize(
    "name, changes", [("nano", {}), ("toy", {"num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 32]}), ("long", {})]
)
def test_a_chunk_keeps_to_the_budget(name, changes):
    """The estimate is of what grows with the chunk; the ops' own blocks are a fixed number of scores."""
    model = lively(name, **changes)
    per_token, fixed = bytes_per_token(model.config, 4), 6 * 2**20
    peaks = {n: peak_bytes(model, 512, budget=n * per_token) for n in (128, 512)}
    assert chunk_tokens(model.config, 4, 1, 128 * per_token) == 128
    growth = (peaks[512] - peaks[128]) / (512 - 128)
    assert 0.3 * per_token < growth <= per_token, f"{name}: {growth:.0f} bytes per token, estimated {per_token}"
    assert peaks[512] <= 512 * per_token + fixed


def test_memory_does_not_grow_with_the_prompt(model):
    short, long = (peak_bytes(model, tokens, chunk=96) for tokens in (192, 768))
    assert long < 1.3 * short


def test_chunk_tokens():
    config = ModelConfig.load("v4-flash")
    per_token = bytes_per_token(config, 2)
    assert 300_000 < per_token < 1_000_000
    assert chunk_tokens(config, 2, 1, 100 * per_token) == 100
    assert chunk_tokens(config, 2, 7, 100 * per_token) == 14
    assert chunk_tokens(config, 2, 4, per_token) == 1 == chunk_tokens(config, 2, 1, 1)
    assert chunk_tokens(config, 2, 1, 2**50) == LARGEST


@pytest.mark.parametrize("call, error, message", [
    (lambda m, c: prefill(m, draw_ids(1, 61), c, chunk=20), ValueError, "69 tokens.*max_length=60"),
    (lambda m, c: prefill(m, draw_ids(2, 6), c), ValueError, "batch_size=1"),
    (lambda m, c: prefill(m, torch.tensor([[3] * 9 + [260]]), c, chunk=2), IndexError, "260"),
    (lambda m, c: prefill(m, draw_ids(1, 0), c), ValueError, "at least one token"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, [0]), ValueError, r"lengths=\[0\]"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, [7]), ValueError, r"lengths=\[7\]"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, [6], keep_streams=2), ValueError, "keep_streams=2"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, keep_streams=-1), ValueError, "keep_streams=-1"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, budget=0), ValueError, "budget=0"),
    (lambda m, c: prefill(m, draw_ids(1, 6), c, chunk=0), ValueError, "chunk=0"),
])  # fmt: skip
def test_errors_change_nothing(model, call, error, message):
    cache, ids = model.new_cache(1, 60), draw_ids(1, 12)
    prefill(model, ids[:, :8], cache)
    with pytest.raises(error, match=message):
        call(model, cache)
    assert cache.lengths.tolist() == [8]
    assert_same("logits", prefill(model, ids[:, 8:], cache).logits, model(ids).logits[:, -1:], 1e-5)
