"""Decoding in numpy: the same logits as the whole sequence at once, taken where it applies, never with old weights.

The oracle is the model's forward pass without a cache, or the same calls with the numpy path turned off.
"""

import contextlib
import copy
import dataclasses
import gc
import importlib
import shutil
import sys
import types
import weakref
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
from lively import draw_ids, lively
from torch import nn

from abyssal.kernels.watch import watched
from abyssal.model import Transformer, decode
from abyssal.model.attention import Attention
from abyssal.model.cache import Step
from abyssal.model.moe import Gate
from abyssal.model.norm import RMSNorm

TOLERANCE = 1e-5  # of logits, absolute, float32
ENGRAM = {"layers": [1, 3], "head_dim": 8, "vocab_size": 500, "heads": 2, "pad_token_id": 258}
SMALL = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 16]}
WHOLE = {"num_hidden_layers": 5, "compress_ratios": [0, 4, 16, 4, 16]}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch):
    """The number of tokens of every call that goes through numpy."""
    calls, original = [], decode.Decoder.__call__

    def spy(self, tokens, past, caches):
        calls.append(len(tokens))
        return original(self, tokens, past, caches)

    monkeypatch.setattr(decode.Decoder, "__call__", spy)
    return calls


@torch.no_grad()
def make(**changes):
    """A layer of each kind; few picks, so that the indexer chooses early; memory that matters, if asked for."""
    model = lively(**{"engram": None, "index_topk": 4, **SMALL, **changes})
    for name, parameter in model.named_parameters():
        if ".table." in name:
            parameter.mul_(20)
    return model


@pytest.fixture
def small():
    """Changed at will by its test."""
    return make()


@pytest.fixture(scope="module")
def nano():
    return make()


@pytest.fixture(scope="module")
def remembering():
    return make(**WHOLE, engram=ENGRAM)


def feed(model, cache, ids, sizes=()):
    """Logits of ids [1, t] in pieces of the given sizes, then of one token."""
    pieces, at = [], 0
    for size in [*sizes, *[1] * ids.shape[1]]:
        if at < ids.shape[1]:
            pieces.append(model(ids[:, at : at + size], cache=cache).logits)
            at += size
    return torch.cat(pieces, 1)


@contextlib.contextmanager
def in_torch():
    """The numpy path is off."""
    most, decode.MOST = decode.MOST, 0
    yield
    decode.MOST = most


def assert_close(got, want, what="logits"):
    assert got.shape == want.shape and got.dtype == want.dtype, what
    error = (got - want).abs().max().item()
    assert error < TOLERANCE, f"{what} differ by {error:.1e}"


# the same logits

KINDS = {
    "sliding": {"num_hidden_layers": 2, "compress_ratios": [0, 0]},
    "csa": {"num_hidden_layers": 2, "compress_ratios": [4, 4]},
    "hca": {"num_hidden_layers": 2, "compress_ratios": [16, 16]},
    "ratio of one token": {"num_hidden_layers": 2, "compress_ratios": [4, 1]},
    "all": WHOLE,
    "one head and group": {"num_attention_heads": 1, "o_groups": 1},
    "one index head": {"index_n_heads": 1},
    "two index heads": {"index_n_heads": 2},
    "16 index heads": {"index_n_heads": 16},
    "one pick": {"index_topk": 1},
    "as many picks as entries": {"index_topk": 99},
    "hash routing": {"num_hash_layers": 3},
    "score routing": {"num_hash_layers": 0},
    "one expert": {"num_experts_per_tok": 1},
    "two shared experts": {"n_shared_experts": 2},
    "no yarn": {"rope_scaling": None},
    "limit reached": {"swiglu_limit": 0.02},
    "engram": {**WHOLE, "engram": ENGRAM},
    "engram without convolution": {"engram": {**ENGRAM, "layers": [1], "kernel_size": 0}},
    "no mtp": {"num_nextn_predict_layers": 0},
    "one stream": {"hc_mult": 1},
    "two streams": {"hc_mult": 2, "hc_eps": 1e-3},
    "one sinkhorn round": {"hc_sinkhorn_iters": 1},
    "large eps": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind, taken):
    """66 tokens: window 16, m 4 (2m 8) and 16 with their neighbours; every tail has moved to a new buffer."""
    model, ids = make(**KINDS[kind]), draw_ids(1, 66)
    cache = model.new_cache(1, 66)
    tails = [(tail, tail.rows) for layer in cache.layers for tail in layer.tails()]
    assert_close(feed(model, cache, ids), model(ids).logits)
    assert taken == [1] * 66
    assert all(tail.rows is not first for tail, first in tails)


def test_the_released_window_and_ratios(taken):
    model, ids = make(compress_ratios=[0, 4, 128], sliding_window=128), draw_ids(1, 262)
    assert_close(feed(model, model.new_cache(1, 262), ids), model(ids).logits)
    assert taken == [1] * 262


def test_one_or_two_tokens_go_through_numpy_and_more_do_not(nano, taken):
    ids, sizes = draw_ids(1, 60), [2, 1, 3, 2, 2, 9, 1, 4, 2, 10, 2, 1, 1, 3, 2, 2, 2, 5]
    assert_close(feed(nano, nano.new_cache(1, 60), ids, sizes), nano(ids).logits)
    assert taken == [n for n in sizes if n <= 2] + [1] * 6


@pytest.mark.parametrize("first", [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_torch_and_numpy_continue_each_other(request, name, first, taken):
    """A prompt in torch, tokens in numpy, more text, tokens until every tail has moved to a new buffer."""
    model, ids = request.getfixturevalue(name), draw_ids(1, first + 47, seed=first)
    with_torch = [first, 1, 2, 1, 1, 1, 9, 1, 1, 2, 3]
    assert_close(feed(model, model.new_cache(1, first + 47), ids, with_torch), model(ids).logits)
    assert len(taken) > 10


@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_hidden_states_streams_and_cache_are_those_of_torch(request, name, taken):
    model, ids = request.getfixturevalue(name), draw_ids(1, 40)
    ours, theirs = model.new_cache(1, 40), model.new_cache(1, 40)
    for at in range(0, 40, 2):
        with torch.enable_grad():
            got = model(ids[:, at : at + 2], cache=ours)
        with in_torch():
            want = model(ids[:, at : at + 2], cache=theirs)
        assert_close(got.hidden, want.hidden, "hidden states")
        assert_close(got.streams, want.streams, "streams")
        assert not got.logits.requires_grad and not got.streams.requires_grad
    assert len(taken) == 20
    assert ours.lengths.tolist() == [40] and ours._furthest == [40]
    for mine, other in zip(ours.layers, theirs.layers):
        for (a, _), (b, _) in zip(mine.tensors(), other.tensors()):
            assert_close(needed(a), needed(b), type(a).__name__)


def needed(holder):
    """The rows that later tokens read."""
    end, keep = getattr(holder, "end", None), getattr(holder, "keep", 0)
    return holder.rows[:, (end or 0) - keep : end]


def test_results_do_not_change_later(nano):
    cache = nano.new_cache(1, 9)
    first = nano(draw_ids(1, 1), cache=cache)
    hidden, streams = first.hidden.clone(), first.streams.clone()
    feed(nano, cache, draw_ids(1, 8, seed=1))
    assert torch.equal(first.hidden, hidden) and torch.equal(first.streams, streams)


def test_logits_to_keep(nano):
    ids, cache = draw_ids(1, 12), nano.new_cache(1, 12)
    full = nano(ids).logits
    feed(nano, cache, ids[:, :8])
    out = nano(ids[:, 8:10], cache=cache, logits_to_keep=1)
    assert_close(out.logits, full[:, 9:10])
    assert out.streams.shape[1] == 2
    assert_close(nano(ids[:, 10:], cache=cache, logits_to_keep=2).logits, full[:, 10:])


# what else happens to a cache


@pytest.mark.parametrize("name", ["nano", "remembering"])
@pytest.mark.parametrize("length", [17, 33, 50])
def test_other_tokens_after_a_rewind(request, name, length, taken):
    model, ids, other = request.getfixturevalue(name), draw_ids(1, 80), draw_ids(1, 80, seed=1)
    filled = model.new_cache(1, 80, rewind=9)
    feed(model, filled, ids[:, :length], [length - 5])
    for back in (1, 2, 5, 9):
        cache = filled.fork(1)
        cache.truncate(length - back)
        changed = torch.cat([ids[:, : length - back], other[:, :14]], 1)
        assert_close(feed(model, cache, changed[:, length - back :]), model(changed).logits[:, length - back :])
    assert len(taken) > 50


def test_a_row_taken_out_of_a_batch(remembering, taken):
    """Prompts of different length; the shorter row goes on alone, in numpy, and leaves its origin as it was."""
    ids, more = draw_ids(2, 70), draw_ids(1, 20, seed=1)
    cache = remembering.new_cache(2, 90)
    remembering(ids, cache=cache, lengths=[70, 37])
    alone = cache.fork(1)
    alone.reorder([1])
    whole = torch.cat([ids[1:, :37], more], 1)
    assert_close(feed(remembering, alone, more), remembering(whole).logits[:, 37:])
    assert taken == [1] * 20
    assert cache.lengths.tolist() == [70, 37]
    both = remembering(more[:, :1].expand(2, 1), cache=cache).logits
    assert_close(both[1:], remembering(whole).logits[:, 37:38])


def test_a_cache_is_filled_to_its_last_token_and_no_further(nano, taken):
    ids, cache = draw_ids(1, 21), nano.new_cache(1, 20)
    assert_close(feed(nano, cache, ids[:, :19]), nano(ids[:, :19]).logits)
    before = state(cache)
    with pytest.raises(ValueError, match="row 0 would have 21 tokens: the cache holds max_length=20"):
        nano(ids[:, 19:], cache=cache)
    assert state(cache) == before and len(taken) == 19
    assert_close(nano(ids[:, 19:20], cache=cache).logits, nano(ids[:, :20]).logits[:, 19:])
    with pytest.raises(ValueError, match="21 tokens"):
        nano(ids[:, 20:], cache=cache)


def state(cache):
    """Lengths, and where every holder's rows lie and end."""
    holders = [
        (rows.data_ptr(), getattr(holder, "end", 0)) for layer in cache.layers for holder, rows in layer.tensors()
    ]
    return cache.lengths.tolist(), cache._furthest, holders


CALLS = {
    "hyper_step": 13,
    "head_norm_step": 7,
    "pool_step": 3,
    "index_topk_step": 3,
    "attention_step": 8,
    "moe_route_step": 9,
    "memory": 3,
}


@pytest.fixture(scope="module")
def undisturbed(remembering):
    """A text token by token: its logits, and the cache where two tokens complete an entry of 4; at 30 and 46 also one
    of 16; at 38 and 46 tails move to new buffers.
    """
    ids, cache, logits, stops = draw_ids(1, 80), remembering.new_cache(1, 80), [], {}
    for at in range(80):
        if at in (22, 30, 38, 46, 78):
            stops[at] = cache.fork(1)
        logits.append(remembering(ids[:, at : at + 1], cache=cache).logits)
    return ids, torch.cat(logits, 1), stops


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("step", CALLS)
def test_an_interrupted_call_leaves_no_trace(remembering, undisturbed, step, error, monkeypatch):
    """In the second token of two."""
    ids, logits, stops = undisturbed
    for at, stop in stops.items():
        cache = stop.fork(1)
        before = state(cache)
        with monkeypatch.context() as patch, pytest.raises(error, match="stopped"):
            patch.setattr(decode, step, stopping(getattr(decode, step), CALLS[step], error))
            patch.setattr(decode, "_sources", WeakKeyDictionary())  # a decoder of its own, which finds the patched step
            remembering(draw_ids(1, 2, seed=1), cache=cache)
        assert state(cache) == before
        assert torch.equal(feed(remembering, cache, ids[:, at : at + 2]), logits[:, at : at + 2])


def stopping(original, calls, error):
    """The function, which raises after a number of calls."""
    left = iter(range(calls))

    def stop(*arguments):
        if next(left, None) is None:
            raise error("stopped")
        return original(*arguments)

    return stop


# models that are not plain


class Louder(RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Wrapped(torch.Tensor):
    """A tensor around another, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        args = [x.inner if isinstance(x, Wrapped) else x for x in args]
        out = op(*args, **(kwargs or {}))
        return Wrapped(out) if op is torch.ops.aten.detach.default else out


def twice(*arguments):
    return 2 * arguments[-1]


def hook(model, stack):
    stack.callback(model.layers[1].attn.indexer.compressor.wkv.register_forward_hook(twice).remove)


def pre_hook(model, stack):
    stack.callback(model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)).remove)


def global_hook(model, stack):
    change = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if isinstance(module, RMSNorm) else None
    )
    stack.callback(change.remove)


def global_pre_hook(model, stack):
    change = nn.modules.module.register_module_forward_pre_hook(
        lambda module, x: (x[0] + 1,) if isinstance(module, RMSNorm) else None
    )
    stack.callback(change.remove)


def subclass(model, stack):
    model.layers[2].attn.kv_norm = Louder(model.config.head_dim, 1e-6)


def patched_instance(model, stack):
    module = model.layers[0].ffn.shared_experts
    original = module.forward
    module.forward = lambda x: 2 * original(x)


def patched_class(model, stack):
    original = Gate.forward
    stack.callback(setattr, Gate, "forward", original)
    Gate.forward = lambda self, x, ids: original(self, 2 * x, ids)


def patched_linear(model, stack):
    original = nn.Linear.forward
    stack.callback(setattr, nn.Linear, "forward", original)
    nn.Linear.forward = lambda self, x: 1.5 * original(self, x)


def other_linear(model, stack):
    old = model.layers[1].attn.wq_a
    model.layers[1].attn.wq_a = nn.Linear(old.in_features, old.out_features)


def added_bias(model, stack):
    model.layers[0].attn.wo_b.bias = nn.Parameter(torch.ones(model.config.hidden_size))


def wrapped_weight(model, stack):
    linear = model.layers[0].attn.wq_b
    linear.weight = nn.Parameter(Wrapped(linear.weight.detach().clone()))


def float64(model, stack):
    model.double()


def one_float64(model, stack):
    model.layers[0].attn.attn_sink.data = model.layers[0].attn.attn_sink.double()


NOT_PLAIN = (hook, pre_hook, global_hook, global_pre_hook, subclass, patched_instance, patched_class, patched_linear)
NOT_PLAIN += (other_linear, added_bias, wrapped_weight, float64, one_float64)


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("change", NOT_PLAIN)
def test_what_is_not_plain_runs_in_torch(small, change, used_before, taken):
    ids = draw_ids(1, 20)
    if used_before:
        feed(small, small.new_cache(1, 20), ids)
        taken.clear()
    with contextlib.ExitStack() as stack:
        change(small, stack)
        assert_close(feed(small, small.new_cache(1, 20), ids, [12]), small(ids).logits)
    assert not taken


def test_a_hook_anywhere_is_seen_and_its_end_too(remembering):
    """A hook that changes nothing but could."""
    step = Step([5], [1], 1)
    for module in list(remembering.modules())[1:]:
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            assert decode.decoder(remembering, step) is None
            handle.remove()
            assert decode.decoder(remembering, step) is not None
        module.forward = module.forward
        assert decode.decoder(remembering, step) is None
        del module.forward
    assert decode.decoder(remembering, step) is not None


def test_hooks_of_the_whole_model_are_called_around_numpy(small, taken):
    """They belong to the call, not to its inside."""
    seen, cache = [], small.new_cache(1, 5)
    handle = small.register_forward_hook(lambda _, __, out: seen.append(out))
    out = small(draw_ids(1, 1), cache=cache)
    handle.remove()
    assert seen == [out] and taken == [1]


def test_bfloat16_runs_in_torch(small, taken):
    ids = draw_ids(1, 24)
    model = small.bfloat16()
    got = feed(model, model.new_cache(1, 24), ids)
    with in_torch():
        assert torch.equal(feed(model, model.new_cache(1, 24), ids), got)
    assert not taken and (got - model(ids).logits).abs().max() < 0.1 * got.abs().max()


def test_a_cache_of_another_dtype_runs_in_torch(small, taken):
    """A model that was cast between its calls."""
    ids = draw_ids(1, 24)
    cache = small.bfloat16().new_cache(1, 24)
    small(ids[:, :20], cache=cache)
    got = feed(small.float(), cache, ids[:, 20:])
    want = small(ids).logits[:, 20:]
    assert not taken and (got - want).norm() < 0.2 * want.norm()


def test_autocast_runs_in_torch(small, taken):
    ids = draw_ids(1, 24)
    with torch.autocast("cpu", torch.bfloat16):
        got = feed(small, small.new_cache(1, 24), ids)
    assert not taken
    with in_torch(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feed(small, small.new_cache(1, 24), ids), got)


def test_compiling_runs_in_torch(small, monkeypatch):
    importlib.import_module("torch._dynamo")  # its tables are made when it is imported: not under a patch
    assert decode.decoder(small, Step([5], [1], 1)) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert decode.decoder(small, Step([5], [1], 1)) is None


def test_batches_and_padding_run_in_torch(nano, taken):
    ids, cache = draw_ids(2, 20), nano.new_cache(2, 20)
    full = nano(ids).logits
    assert_close(torch.cat([nano(ids[:, t : t + 1], cache=cache).logits for t in range(20)], 1), full)
    cache = nano.new_cache(1, 20)
    for t in range(20):
        logits = nano(ids[:1, t : t + 1].expand(1, 2), cache=cache, lengths=[1]).logits
        assert_close(logits[:, :1], full[:1, t : t + 1])
        nano(ids[:1, :1], cache=cache, lengths=[0])
    assert not taken and cache.lengths.tolist() == [20]
    cache.truncate(20)
    cache = nano.new_cache(1, 20)
    assert_close(nano(ids[:1, :2], cache=cache, lengths=[2]).logits, full[:1, :2])
    assert taken == [2]


# an edit in one of the two that compute a token

EDITS = {
    "router": ("moe.py", "logits = exact_linear(x, self.weight)", "logits = exact_linear(x, self.weight).tanh()"),
    "scale": ("attention.py", "self.config.head_dim**-0.5", "0.5 * self.config.head_dim**-0.5"),
    "output": ("attention.py", "rope(out, rotation, inverse=True)", "out"),
    "pooling": ("compressor.py", "k, z, self.ape, ratio", "k, 0 * z, self.ape, ratio"),
    "entry": ("compressor.py", "pooled.to(dtype)", "pooled.to(dtype).abs()"),
    "index keys": (
        "indexer.py",
        "keys = self.compressor(x, layout, cache)",
        "keys = self.compressor(x.abs(), layout, cache)",
    ),
    "index scores": ("indexer.py", "weights = self.weights_proj(x)", "weights = -self.weights_proj(x)"),
    "streams": ("hyper.py", "coefficients.post, coefficients.comb)", "coefficients.post, coefficients.comb.mT)"),
    "step": ("decode.py", "out += self.shared(", "out -= self.shared("),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder from which packages of edited modules can be imported."""
    folder = tmp_path_factory.mktemp("edited")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def edited(house, name):
    """The class `Transformer` of a copy of the source with an edit in it."""
    source, package = Path(decode.__file__).parent, house / f"edited_{name.replace(' ', '_')}"
    file, old, new = EDITS.get(name, ("moe.py", "", ""))
    if not package.exists():
        shutil.copytree(source, package / "model")
        (package / "kernels").symlink_to(source.parent / "kernels")
        text = (package / "model" / file).read_text("utf-8")
        assert old in text
        (package / "model" / file).write_text(text.replace(old, new), "utf-8")
    return importlib.import_module(f"{package.name}.model")


def copied(model, package):
    """The same weights in the edited class."""
    twin = package.Transformer(package.ModelConfig.from_dict(model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("storage", ["exact", "released"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edited_mechanism_is_never_silently_another_model(nano, house, name, storage):
    """The whole pass, and a prompt with tokens after it, are the same model; one warning, and then it is quiet."""
    model, ids = copied(nano, edited(house, name)), draw_ids(1, 60)
    cache, plain = model.new_cache(1, 60, storage=storage), model.new_cache(1, 60, storage=storage)
    with pytest.warns(RuntimeWarning, match="one has been edited and the other has not") as warned:
        got = feed(model, cache, ids, [22])
    model.fast_decode = False
    assert len(warned) == 1
    assert_close(got, feed(model, plain, ids, [22]))
    if storage == "exact":
        assert_close(got, model(ids).logits)
    assert (got - nano(ids).logits).abs().max() > TOLERANCE or name == "step"


def test_a_copy_without_an_edit_decodes_in_numpy(nano, house, recwarn):
    model, ids = copied(nano, edited(house, "nothing")), draw_ids(1, 60)
    got = feed(model, model.new_cache(1, 60), ids, [5])
    model.fast_decode = False
    assert not torch.equal(got, feed(model, model.new_cache(1, 60), ids, [5])) and not recwarn.list


@pytest.fixture
def by_modules(monkeypatch):
    """The positions that are computed by the modules too."""
    positions, original = [], Transformer._continue

    def spy(self, ids, step, *rest):
        positions.append(step.past[0])
        return original(self, ids, step, *rest)

    monkeypatch.setattr(Transformer, "_continue", spy)
    return positions


def test_what_is_looked_at(small, by_modules, taken, monkeypatch):
    """Positions twice as far; a full window; the first and second entries of 4 and 16; 1, 2, 4 and 8 entries that are
    not among the 4 picks; once. Where nothing is new, every so many tokens.
    """
    ids = draw_ids(1, 70)
    feed(small, small.new_cache(1, 70), ids)
    assert by_modules == [0, 1, 3, 7, 15, 16, 19, 23, 31, 47, 63] and len(taken) == 70
    by_modules.clear()
    feed(small, small.new_cache(1, 70), ids)
    assert not by_modules
    feed(small, small.new_cache(1, 70, storage="released"), ids[:, :5])
    assert by_modules == [0, 1, 3]
    monkeypatch.setattr(decode, "ANYHOW", 30)
    feed(small, small.new_cache(1, 70), ids)
    assert by_modules[3:] == [29, 60]


def test_nothing_is_looked_at_while_somebody_watches(small, by_modules, taken):
    """A profile measures the token alone."""
    with watched(types.SimpleNamespace(begins=lambda what: None, ends=lambda what: None)):
        feed(small, small.new_cache(1, 9), draw_ids(1, 9))
    assert not by_modules and len(taken) == 9
    feed(small, small.new_cache(1, 9), draw_ids(1, 9))
    assert by_modules


def other_eps(model, patch):
    model.layers[1].ffn_norm.eps, model.layers[1].attn.q_norm.eps = 0.5, 0.1


def other_limit(model, patch):
    model.layers[0].ffn.experts.limit = model.layers[0].ffn.shared_experts.limit = 0.01


def other_rounds(model, patch):
    model.layers[0].hc_attn.iterations, model.layers[0].hc_attn.eps = 1, 0.1


def other_picks(model, patch):
    model.layers[1].attn.config = dataclasses.replace(model.config, index_topk=1)


def transposed(model, patch):
    """In the memory where it was."""
    linear = model.layers[0].attn.wq_a
    linear.weight = nn.Parameter(linear.weight.detach().T)


def method_of_an_instance(model, patch):
    module = model.layers[2].attn
    patch.setattr(module, "_project", lambda out, stock=module._project: 2 * stock(out), raising=False)


def method_of_a_class(model, patch):
    patch.setattr(Attention, "_project", lambda self, out, stock=Attention._project: 2 * stock(self, out))


def method_of_the_model(model, patch):
    patch.setattr(model, "_streams", lambda ids, stock=model._streams: 2 * stock(ids), raising=False)


def function_of_a_file(model, patch):
    file = sys.modules[Gate.__module__]
    patch.setattr(
        file, "moe_route", lambda logits, *rest, stock=file.moe_route, **named: stock(-logits, *rest, **named)
    )


def code_of_a_function(model, patch):
    """As a notebook reloads an edited file."""

    def _read(self, streams):
        return 2 * self.norm(self.hc_head(streams))

    patch.setattr(Transformer._hidden, "__code__", _read.__code__)


FOLLOWED = (other_eps, other_limit, other_rounds, other_picks, transposed)
LEFT = (method_of_an_instance, method_of_a_class, method_of_the_model, function_of_a_file, code_of_a_function)


@pytest.mark.parametrize("change", FOLLOWED + LEFT)
def test_what_is_changed_between_tokens_is_seen(change, monkeypatch, recwarn):
    """In numpy where an attribute says it, by the modules, with a warning, where only they know."""
    model, ids = make(q_lora_rank=64), draw_ids(1, 50)
    caches = [model.new_cache(1, 50) for _ in range(3)]
    for cache in caches:
        feed(model, cache, ids[:, :30], [12])
    before = feed(model, caches[0], ids[:, 30:])
    assert not recwarn.list
    change(model, monkeypatch)
    got = feed(model, caches[1], ids[:, 30:])
    assert len(recwarn.list) == (change in LEFT)
    model.fast_decode = False
    want = feed(model, caches[2], ids[:, 30:])
    assert_close(got, want)
    assert (want - before).abs().max() > 1e-3


def test_a_look_leaves_no_trace(remembering, by_modules):
    """The same bits in tokens and cache with and without it."""
    ids, ours, theirs = draw_ids(1, 60), remembering.new_cache(1, 60), remembering.new_cache(1, 60)
    decode._trust.pop(remembering, None)
    first = feed(remembering, ours, ids, [9])
    looks = len(by_modules)
    assert torch.equal(first, feed(remembering, theirs, ids, [9])) and looks > 3 and len(by_modules) == looks + 1
    assert ours._furthest == theirs._furthest == [60]
    for mine, other in zip(ours.layers, theirs.layers):
        for (a, _), (b, _) in zip(mine.tensors(), other.tensors()):
            assert torch.equal(needed(a), needed(b)) and getattr(a, "end", 0) == getattr(b, "end", 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_look_leaves_no_trace(small, error, monkeypatch):
    cache = small.new_cache(1, 9)
    feed(small, cache, draw_ids(1, 3))
    before = state(cache)
    with monkeypatch.context() as patch, pytest.raises(error, match="stopped"):
        patch.setattr(Gate, "forward", stopping(Gate.forward, 1, error))
        patch.setitem(decode.FORWARD, Gate, Gate.forward)
        small(draw_ids(1, 1, seed=3), cache=cache)
    assert state(cache) == before


def test_switched_off(small, taken, monkeypatch):
    ids = draw_ids(1, 9)
    small.fast_decode = False
    feed(small, small.new_cache(1, 9), ids)
    small.fast_decode = True
    monkeypatch.setenv("ABYSSAL_FAST_DECODE", "0")
    feed(small, small.new_cache(1, 9), ids)
    assert not taken
    monkeypatch.delenv("ABYSSAL_FAST_DECODE")
    feed(small, small.new_cache(1, 9), ids)
    assert taken == [1] * 9


def test_near_ties_need_three_differences_in_a_row(small, monkeypatch, recwarn):
    """A pick within rounding may fall either way; an agreement in between starts the count anew."""
    trust, step = decode.Trust(), Step([5], [1], 1)
    answers = [trust.judge(apart, step, 3) for apart in (1e-2, 1e-2, 1e-6, 1e-2, 1e-2)]
    assert answers == [False, False, True, False, False] and not trust.lost and not recwarn.list
    with pytest.warns(RuntimeWarning, match=r"1\.0e-02 of the largest value at position 5"):
        trust.judge(1e-2, step, 3)
    assert trust.lost


def test_difference():
    a, nan = torch.tensor([1.0, -4.0]), float("nan")
    assert decode.difference(a, a) == 0 and decode.difference(a + 0.4, a) == pytest.approx(0.1)
    assert decode.difference(torch.tensor([nan, torch.inf]), torch.tensor([nan, torch.inf])) == 0
    assert decode.difference(torch.tensor([nan, 1.0]), torch.tensor([1.0, 1.0])) == torch.inf
    assert decode.difference(a, a[:1]) == torch.inf and decode.difference(a[:0], a[:0]) == 0


# weights that change


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with torch.enable_grad():
        model(draw_ids(2, 20), targets=draw_ids(2, 20, seed=1)).loss.backward()
    optimizer.step()


def router_bias(model):
    with torch.enable_grad():
        model.train()(draw_ids(2, 20), targets=draw_ids(2, 20, seed=1))
    model.eval().update_router_bias(0.3)


def load_assigned(model):
    model.load_state_dict(make(seed=1).state_dict(), assign=True)


def load_copied(model):
    model.load_state_dict(make(seed=1).state_dict())


def other_layer(model):
    model.layers[1] = make(seed=1).layers[1]


def other_leaf(model):
    model.layers[2].attn.compressor.wgate = make(seed=1).layers[2].attn.compressor.wgate


def other_norm(model):
    model.norm = make(seed=1).norm


def there_and_back(model):
    model.double()
    model.layers[0].attn.wo_b.weight.mul_(1.5)
    model.float()


def functional(model):
    """Without a word to any module."""
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


CHANGES = (optimizer_step, router_bias, load_assigned, load_copied, other_layer, other_leaf, other_norm)
CHANGES += (there_and_back, functional)


@pytest.mark.parametrize("change", CHANGES)
def test_the_weights_in_use_are_those_of_now(small, change, taken):
    ids = draw_ids(1, 24)
    before = feed(small, small.new_cache(1, 24), ids)
    for _ in range(2):
        change(small)
        taken.clear()
        got = feed(small, small.new_cache(1, 24), ids)
        assert_close(got, small(ids).logits)
        assert len(taken) == 24
    assert (got - before).abs().max() > 1e-3


def test_every_tensor_put_in_anew_is_used():
    """A token after each change, in numpy and in torch, each with its own cache."""
    model = make(engram={**ENGRAM, "layers": [1]})
    names = [name for name in model.state_dict() if not name.startswith("mtp")]
    ids = draw_ids(1, 30 + len(names))
    ours, theirs = (model.new_cache(1, ids.shape[1]) for _ in range(2))
    model(ids[:, :30], cache=ours), model(ids[:, :30], cache=theirs)
    for name, token in zip(names, ids[:, 30:].split(1, 1)):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, leaf)
        changed = 1.3 * tensor if tensor.is_floating_point() else tensor.roll(1, 0)
        setattr(module, leaf, nn.Parameter(changed) if leaf in module._parameters else changed)
        got = model(token, cache=ours).logits
        with in_torch():
            assert_close(got, model(token, cache=theirs).logits, name)


def test_a_copy_has_its_own_weights(small, taken):
    ids = draw_ids(1, 24)
    feed(small, small.new_cache(1, 24), ids)
    other = copy.deepcopy(small)
    for parameter in small.parameters():
        parameter.mul_(1.2)
    for model in (other, small, other):
        taken.clear()
        assert_close(feed(model, model.new_cache(1, 24), ids), model(ids).logits)
        assert len(taken) == 24


def test_a_decoder_is_made_once_while_nothing_changes(small):
    step = Step([5], [1], 1)
    first = decode.decoder(small, step)
    feed(small, small.new_cache(1, 5), draw_ids(1, 5))
    small(draw_ids(1, 5))
    assert decode.decoder(small, step) is first
    load_copied(small)
    assert decode.decoder(small, step) is first


def test_a_model_that_has_decoded_can_be_freed():
    model = make(engram={**ENGRAM, "layers": [1]})
    feed(model, model.new_cache(1, 3), draw_ids(1, 3))
    weight, model = weakref.ref(model.embed.weight), weakref.ref(model)
    gc.collect()
    assert model() is None and weight() is None
