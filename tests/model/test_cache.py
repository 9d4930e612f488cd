"""The cache: what a model computes piece by piece is what it computes at once, and nothing but a call changes it.

The oracle is the model's own forward pass without a cache, which the parity tests hold against transformers. Weights
are moved away from their start, so that norms, sinks, slot biases and memory matter to the logits.
"""

import random

import pytest
import torch
from oracle import assert_same

from abyssal.model import ModelConfig, Transformer

TOLERANCE = 1e-4  # of logits, absolute, float32
NANO = {key: value for key, value in ModelConfig.load("nano").to_dict().items() if key != "engram"}
NANO |= {"num_hidden_layers": 4, "compress_ratios": [0, 4, 16, 4], "n_routed_experts": 4, "hc_sinkhorn_iters": 3}
ENGRAM = {"layers": [1, 3], "head_dim": 8, "vocab_size": 500, "heads": 2, "pad_token_id": 258}
ROWS = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def make(seed=0, **changes):
    """A nano model of four layers without Engram, changed, whose weights are not those of a start."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.from_dict({**NANO, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith((".ape", "_norm", ".conv")):
                p.add_(0.3 * torch.randn_like(p))
            elif not name.endswith(".fn"):
                p.mul_(40 if ".table." in name else 20 if name == "head.weight" else 2)
    return model


@pytest.fixture(scope="module")
def nano():
    """Queries choose among entries from token 20 on."""
    return make(index_topk=4)


@pytest.fixture(scope="module")
def remembering():
    """Engram in two CSA layers, with its convolution."""
    return make(engram=ENGRAM)


def draw(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def feed(model, cache, ids, sizes):
    """Logits of ids [b, t], appended in pieces of the given sizes, the last of which takes what is left."""
    pieces, at = [], 0
    for size in [*sizes, ids.shape[1]]:
        if at < ids.shape[1]:
            pieces.append(model(ids[:, at : at + size], cache=cache).logits)
            at += size
    return torch.cat(pieces, 1)


def split_at_random(total, generator):
    """Piece sizes from 1 to 300, small ones more often."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(generator.choice([1, 1, 2, 3, generator.randint(4, 20), generator.randint(20, 300)]))
    return sizes


def assert_equal_logits(got, want, what):
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} for {tuple(want.shape)}"
    error = (got - want).abs().max().item() if got.numel() else 0.0
    assert error < TOLERANCE, f"{what}: logits differ by {error:.1e}"


def held(cache):
    """Copies of everything that the cache holds, down to every byte reserved."""
    state = {"lengths": cache.lengths, "furthest": torch.tensor(cache._furthest)}
    for number, layer in enumerate(cache.layers):
        for i, (holder, rows) in enumerate(layer.tensors()):
            state[f"layer {number} holder {i}"] = rows.clone()
            state[f"layer {number} end {i}"] = torch.tensor(getattr(holder, "end", 0))
    return state


def assert_untouched(cache, before):
    after = held(cache)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), f"{name} changed"


# every split


def test_every_split_of_a_sequence(nano):
    """70 tokens: window 16, m 4 (2m 8) and 16, with all their neighbours; a tail's buffer holds 47."""
    ids = draw(1, 70)
    full = nano(ids).logits
    for cut in range(1, 70):
        assert_equal_logits(feed(nano, nano.new_cache(1, 70), ids, [cut]), full, f"split at {cut}")


@pytest.fixture(scope="module")
def wide():
    """The released window and ratios."""
    return make(num_hidden_layers=3, compress_ratios=[0, 4, 128], sliding_window=128, num_nextn_predict_layers=0)


@pytest.mark.parametrize("cut", [*range(1, 6), *range(126, 132), *range(254, 261)])
def test_splits_around_the_released_window(wide, cut):
    ids = draw(1, 270)
    full = wide(ids).logits
    assert_equal_logits(feed(wide, wide.new_cache(1, 270), ids, [cut]), full, "two pieces")
    assert_equal_logits(feed(wide, wide.new_cache(1, 270), ids, [cut, 1, 2, 1]), full, "a token after the split")


def test_an_entry_that_spans_three_calls(wide):
    """HCA windows and CSA overlaps whose tokens come in many pieces."""
    ids = draw(1, 270)
    full = wide(ids).logits
    for size in (3, 50, 127):
        assert_equal_logits(feed(wide, wide.new_cache(1, 270), ids, [size] * 90), full, f"pieces of {size}")


def test_token_by_token(nano):
    ids = draw(2, 100, seed=1)
    assert_equal_logits(feed(nano, nano.new_cache(2, 100), ids, [1] * 100), nano(ids).logits, "one token at a time")


@pytest.mark.parametrize("heads", [1, 2, 4, 16])
def test_random_splits_of_two_thousand_tokens(heads):
    """With few index heads many scores are exactly zero: the cut through these ties may not depend on the split."""
    model, ids, sizes = make(index_n_heads=heads), draw(1, 2000, seed=heads), random.Random(heads)
    full = model(ids).logits
    for trial in range(2 if heads == 1 else 1):
        pieces = split_at_random(2000, sizes)
        assert_equal_logits(feed(model, model.new_cache(1, 2000), ids, pieces), full, f"trial {trial}, {pieces}")


def test_ties_are_common_with_one_index_head(monkeypatch):
    """Guards the test above: the k-th score is shared by an entry that is not picked, in a good part of the queries."""
    from abyssal.kernels.index_topk.eager import index_scores
    from abyssal.model import attention

    tied = []

    def counting(q, weights, keys, *, k, start, end):
        scores = index_scores(q, weights, keys)
        for t in range(300, scores.shape[1], 7):
            best = scores[0, t, : int(end[0, t])].sort(descending=True).values
            tied.append(float(best[k - 1] == best[k]))
        return original(q, weights, keys, k=k, start=start, end=end)

    original = attention.index_topk
    monkeypatch.setattr(attention, "index_topk", counting)
    make(index_n_heads=1)(draw(1, 1000, seed=1))
    assert sum(tied) / len(tied) > 0.2


def test_logits_to_keep(nano):
    ids, cache = draw(2, 60), nano.new_cache(2, 60)
    full = nano(ids).logits
    assert_equal_logits(nano(ids[:, :50], cache=cache, logits_to_keep=3).logits, full[:, 47:50], "last three")
    assert_equal_logits(nano(ids[:, 50:], cache=cache, logits_to_keep=1).logits, full[:, 59:], "last")


def test_a_cache_can_be_filled_to_its_last_token(nano):
    for length in (1, 3, 4, 5, 16, 33):
        ids, cache = draw(1, length), nano.new_cache(1, length)
        assert_equal_logits(feed(nano, cache, ids, [length - 1] if length > 1 else []), nano(ids).logits, f"{length}")
        assert cache.lengths.tolist() == [length]


# Engram


def test_memory_and_convolution_across_splits(remembering):
    """n-grams reach 2 tokens back, the convolution 9."""
    ids = draw(2, 42)  # more than the 34 and 41 rows of their buffers
    full = remembering(ids).logits
    for cut in range(1, 26):
        got = feed(remembering, remembering.new_cache(2, 26), ids[:, :26], [cut])
        assert_equal_logits(got, full[:, :26], f"split at {cut}")
    assert_equal_logits(feed(remembering, remembering.new_cache(2, 42), ids, [1] * 42), full, "one token at a time")


def test_memory_without_convolution():
    model, ids = make(engram={**ENGRAM, "kernel_size": 0}), draw(1, 40)
    for cut in (1, 2, 3, 20):
        assert_equal_logits(feed(model, model.new_cache(1, 40), ids, [cut, 1, 1]), model(ids).logits, f"split at {cut}")


def test_memory_matters_here(remembering):
    """Guards the tests above: tokens 2 back change what the memory adds, and the convolution what it reads."""
    ids, seen = draw(1, 30), {}
    engram = remembering.layers[1].engram
    hook = engram.register_forward_hook(lambda _, __, out: seen.update(out=out))
    remembering(ids)
    first = seen["out"]
    changed = ids.clone()
    changed[0, 10] += 1
    remembering(changed)
    hook.remove()
    moved = (seen["out"] - first).abs().amax((0, 2, 3))
    assert (moved[[10, 11, 12, 15, 18, 21]] > 1e-2).all() and not moved[:10].any()


# rows of different length


def feed_ragged(model, cache, rows, generator, longest, rewind=0):
    """Appends the rows [t_b] of a batch in random pieces, cuts back at random, and returns the logits of each row."""
    at, kept = [0] * len(rows), [[] for _ in rows]
    furthest = list(at)
    while any(len(row) > seen for row, seen in zip(rows, at)):
        columns = generator.randint(1, longest)
        counts = [min(generator.randint(0, columns), len(row) - seen) for row, seen in zip(rows, at)]
        ids = draw(len(rows), columns, seed=generator.randint(0, 10**6))  # what is not real is noise
        for b, n in enumerate(counts):
            ids[b, :n] = rows[b][at[b] : at[b] + n]
        logits = model(ids, cache=cache, lengths=counts).logits
        for b, n in enumerate(counts):
            kept[b] += logits[b, :n]
            at[b] += n
        furthest = [max(pair) for pair in zip(furthest, at)]
        if rewind and generator.random() < 0.4:
            at = [max(0, seen - generator.randint(0, rewind), far - rewind) for seen, far in zip(at, furthest)]
            at = [min(n, len(k)) for n, k in zip(at, kept)]
            cache.truncate(at)
            kept = [logits[:n] for logits, n in zip(kept, at)]
        assert cache.lengths.tolist() == at
    return [torch.stack(logits) for logits in kept]


@pytest.mark.parametrize("longest, rewind", [(4, 0), (60, 0), (4, 6), (60, 6)])
@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_rows_of_different_length(request, name, longest, rewind):
    model = request.getfixturevalue(name)
    generator = random.Random(longest + rewind)
    rows = [draw(n, seed=n) for n in ((40, 23, 31) if longest == 4 else (137, 64, 90))]
    cache = model.new_cache(3, 140, rewind=rewind)
    for row, logits in zip(rows, feed_ragged(model, cache, rows, generator, longest, rewind)):
        assert_equal_logits(logits, model(row[None]).logits[0], f"row of {len(row)}")


def test_a_ragged_prompt_then_even_decoding(nano):
    """The everyday case: prompts of different length side by side, padded on the right, then a token for each row."""
    rows = [draw(n + 40, seed=n) for n in (1, 2, 15, 16, 33, 80)]
    prompts, cache = [1, 2, 15, 16, 33, 80], nano.new_cache(6, 120)
    ids = torch.stack([torch.cat([row[:n], draw(80 - n, seed=n)]) for row, n in zip(rows, prompts)])
    logits = [[out[:n]] for out, n in zip(nano(ids, cache=cache, lengths=torch.tensor(prompts)).logits, prompts)]
    for step in range(40):
        out = nano(torch.stack([row[n + step] for row, n in zip(rows, prompts)])[:, None], cache=cache).logits
        for b in range(6):
            logits[b].append(out[b])
    for row, pieces in zip(rows, logits):
        assert_equal_logits(torch.cat(pieces), nano(row[None]).logits[0], f"row of {len(row)}")


def test_rows_may_get_no_token(nano):
    ids, cache = draw(2, 50), nano.new_cache(2, 50)
    nano(ids[:, :20], cache=cache, lengths=[20, 0])
    nano(draw(2, 3), cache=cache, lengths=[0, 0])
    out = nano(ids, cache=cache, lengths=[0, 50])
    assert cache.lengths.tolist() == [20, 50]
    assert_equal_logits(out.logits[1:], nano(ids[1:]).logits, "the row that waited")
    ids[1, :30] = ids[0, 20:]
    rest = nano(ids[[1, 1], :30], cache=cache, lengths=[30, 0]).logits
    assert_equal_logits(rest[:1], nano(ids[:1]).logits[:, 20:], "the row that went first")


# rewinding


@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_other_tokens_after_a_rewind(request, name):
    """Every amount up to the declared one, at lengths around window and ratios, against a sequence never rewound."""
    model, rewind = request.getfixturevalue(name), 9
    ids, other = draw(2, 80), draw(2, 80, seed=1)
    for length in (9, 17, 33, 58, 66) if name == "nano" else (16, 19, 52):  # 58, 52: the last five move a buffer's rows
        filled, end = model.new_cache(2, 80, rewind=rewind), length + 14
        feed(model, filled, ids[:, :length], [length - 5])
        starts = [length - back for back in range(rewind + 1)]
        changed = [torch.cat([ids[:, :start], other[:, start:end]], 1) for start in starts]
        full = model(torch.cat(changed)).logits.split(2)
        for start, tokens, logits in zip(starts, changed, full):
            cache, stop = filled.fork(1), start + 14
            cache.truncate(start)
            got = feed(model, cache, tokens[:, start:stop], [1, 3])
            assert_equal_logits(got, logits[:, start:stop], f"{length - start} back from {length}")


def test_drafting_and_taking_back_without_end(nano):
    """The life of speculative decoding: five tokens forward, some of them back, over several windows."""
    generator, rewind = random.Random(0), 5
    ids, cache = draw(1, 140), nano.new_cache(1, 145, rewind=rewind)
    full, at = nano(ids).logits, 0
    while at + rewind < 140:
        wrong = draw(1, rewind, seed=at)
        right = generator.randint(1, rewind)
        wrong[:, :right] = ids[:, at : at + right]
        got = nano(wrong, cache=cache).logits
        assert_equal_logits(got[:, :right], full[:, at : at + right], f"{right} tokens at {at}")
        at += right
        cache.truncate([at])
        assert cache.lengths.tolist() == [at]


def test_rewinding_counts_from_the_furthest_token(nano):
    """Two rewinds in a row reach no further than one: what lies behind is not held any more."""
    cache = nano.new_cache(1, 60, rewind=4)
    nano(draw(1, 50), cache=cache)
    cache.truncate(47)
    cache.truncate(46)
    before = held(cache)
    with pytest.raises(ValueError, match=r"lengths\[0\]=45: the row has been 50 tokens long and rewind=4 was declared"):
        cache.truncate(45)
    assert_untouched(cache, before)
    nano(draw(1, 2), cache=cache)
    with pytest.raises(ValueError, match=r"lengths\[0\]=45: the row has been 50 tokens long"):
        cache.truncate(45)
    nano(draw(1, 4), cache=cache)
    cache.truncate(torch.tensor([48]))
    with pytest.raises(ValueError, match=r"lengths\[0\]=47: the row has been 52 tokens long"):
        cache.truncate(47)


# reorder and fork


@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_reorder(request, name):
    """A beam search's step: rows are dropped, doubled and exchanged; rows of different length go along."""
    model = request.getfixturevalue(name)
    ids, cache = draw(ROWS, 70), model.new_cache(ROWS, 120, rewind=3)
    lengths = [70, 41, 18]
    model(ids, cache=cache, lengths=lengths)
    order = [2, 0, 0, 1]
    cache.reorder(order)
    assert cache.batch_size == 4 and cache.lengths.tolist() == [18, 70, 70, 41]
    cache.truncate([16, 70, 67, 41])
    starts = [ids[2, :16], ids[0, :70], ids[0, :67], ids[1, :41]]
    more = draw(4, 40, seed=1)
    got = feed(model, cache, more, [1, 20])
    for b, start in enumerate(starts):
        full = model(torch.cat([start, more[b]])[None]).logits
        assert_equal_logits(got[b : b + 1], full[:, len(start) :], f"row {b}")
    cache.reorder(torch.tensor([3]))
    assert cache.batch_size == 1 and cache.lengths.tolist() == [81]


def test_fork_leaves_the_original_alone(nano):
    ids, cache = draw(2, 90), nano.new_cache(2, 90, rewind=2)
    nano(ids[:, :50], cache=cache)
    before = held(cache)
    forked = cache.fork(2)
    assert forked.batch_size == 4 and forked.nbytes() == 2 * cache.nbytes()
    other = draw(4, 40, seed=1)
    got = feed(nano, forked, other, [7])
    assert_untouched(cache, before)
    whole = torch.cat([ids[[0, 0, 1, 1], :50], other], 1)
    assert_equal_logits(got, nano(whole).logits[:, 50:], "the fork")
    assert_equal_logits(feed(nano, cache, ids[:, 50:], [1]), nano(ids).logits[:, 50:], "the original")
    before = held(forked)
    cache.truncate(88)
    assert_untouched(forked, before)


# drafting with the MTP block


def mtp_logits(model, ids):
    """Position t, with token t + 1 at hand, of the whole sequence at once; and the streams that it starts from."""
    from abyssal.model.layout import make_layout

    seen = {}
    hook = model.hc_head.register_forward_hook(lambda _, inputs, __: seen.update(streams=inputs[0]))
    model(ids)
    hook.remove()
    streams, following = seen["streams"][:, :-1], ids[:, 1:]
    layout = make_layout(following, None)
    hidden, _ = model.mtp[0].predict(streams, model.embed(following), following, layout)
    return model.head(hidden)


@pytest.mark.parametrize("name", ["nano", "remembering"])
def test_drafts_are_those_of_the_whole_sequence(request, name):
    model = request.getfixturevalue(name)
    ids = draw(2, 100)
    want = mtp_logits(model, ids)
    for cut in (1, 15, 16, 17, 40, 98):
        cache, drafts = model.new_cache(2, 100), model.new_draft_cache(2, 100)
        got = []
        for piece in (slice(0, cut), slice(cut, cut + 1), slice(cut + 1, 99)):
            if ids[:, piece].shape[1] and piece.start < 99:
                streams = model(ids[:, piece], cache=cache).streams
                following = ids[:, piece.start + 1 : min(piece.stop, 99) + 1]
                got.append(model.draft(streams, following, drafts).logits)
        assert_equal_logits(torch.cat(got, 1), want, f"split at {cut}")


def test_drafts_that_are_taken_back(nano):
    """Rejected tokens leave both caches; rows are of different length."""
    ids, wrong = draw(2, 60), draw(2, 60, seed=1)
    want = mtp_logits(nano, ids)
    cache, drafts = nano.new_cache(2, 70, rewind=4), nano.new_draft_cache(2, 70, rewind=4)
    for count in ([30, 20], [29, 17]):
        mixed = torch.where(torch.arange(30) < torch.tensor(count)[:, None], ids[:, :30], wrong[:, :30])
        if count[0] == 30:
            streams = nano(mixed, cache=cache, lengths=count).streams
            nano.draft(streams, mixed.roll(-1, 1), drafts, lengths=[29, 19])
        cache.truncate(count)
        drafts.truncate([n - 1 for n in count])
    rest = torch.stack([ids[0, 28:59], ids[1, 16:47]])
    streams = nano(rest[:, 1:], cache=cache).streams
    before = nano.new_cache(2, 70)
    first = nano(ids[:, :29], cache=before).streams
    streams = torch.cat([torch.stack([first[0, 28:29], first[1, 16:17]]), streams], 1)
    following = torch.stack([ids[0, 29:60], ids[1, 17:48]])
    got = nano.draft(streams, following, drafts).logits
    assert_equal_logits(got[0], want[0, 28:59], "row 0")
    assert_equal_logits(got[1], want[1, 16:47], "row 1")


def test_drafting_may_begin_a_window_before(nano):
    """The block sees a window only: drafts agree once a window of positions was appended."""
    ids, window = draw(1, 90), nano.config.sliding_window
    want = mtp_logits(nano, ids)
    streams = nano(ids[:, :-1], cache=nano.new_cache(1, 90)).streams
    got = nano.draft(streams[:, 40:], ids[:, 41:], nano.new_draft_cache(1, 90)).logits
    assert_equal_logits(got[:, window - 1 :], want[:, 40 + window - 1 :], "after a window")
    assert (got[:, : window - 1] - want[:, 40 : 40 + window - 1]).abs().max() > 1e-2


# refused and interrupted calls


def refused(nano):
    """Calls with a cache of 2 rows, 50 of 60 tokens, rewind 3; and what they say."""
    ids, other = draw(2, 5), make(num_experts_per_tok=1)
    return {
        "past the end": (lambda c: nano(draw(2, 11), cache=c), r"row 0 would have 61 tokens: .* max_length=60"),
        "a row past the end": (
            lambda c: nano(draw(2, 11), cache=c, lengths=[1, 11]),
            r"row 1 would have 61 tokens: the cache holds max_length=60",
        ),
        "batch size": (lambda c: nano(draw(3, 5), cache=c), r"ids has 3 rows: .* batch_size=2"),
        "model": (lambda c: other(ids, cache=c), "another model"),
        "draft": (lambda c: nano.draft(nano.embed(ids)[:, :, None], ids, c), "made by new_cache: .* new_draft_cache"),
        "too many lengths": (lambda c: nano(ids, cache=c, lengths=[1, 2, 3]), r"lengths=\[1, 2, 3\]: one .* row \(2\)"),
        "negative length": (lambda c: nano(ids, cache=c, lengths=[-1, 2]), r"lengths=\[-1, 2\].* 0 to the 5 columns"),
        "length past t": (lambda c: nano(ids, cache=c, lengths=[5, 6]), r"lengths=\[5, 6\].* 0 to the 5 columns"),
        "targets": (lambda c: nano(ids, targets=ids, cache=c), "targets cannot be given together with a cache"),
        "documents": (lambda c: nano(ids, documents=ids, cache=c), "documents cannot be given together with a cache"),
        "no tokens": (lambda c: nano(ids[:, :0], cache=c), "at least one token"),
        "logits to keep": (lambda c: nano(ids, cache=c, logits_to_keep=6), "logits_to_keep=6: .* 5"),
        "a token": (lambda c: nano(ids + 300, cache=c), r"ids holds token id 5\d\d: allowed are 0 to 259"),
        "truncated longer": (lambda c: c.truncate(51), r"lengths\[0\]=51: allowed are 0 to the row's 50 tokens"),
        "truncated below zero": (lambda c: c.truncate([50, -1]), r"lengths\[1\]=-1: allowed are 0"),
        "truncated too far": (lambda c: c.truncate([50, 46]), r"lengths\[1\]=46: .* 50 tokens long and rewind=3"),
        "truncated another batch": (lambda c: c.truncate([50]), r"lengths has 1 values: the cache has 2 rows"),
        "no row": (lambda c: c.reorder([]), r"rows=\[\]: allowed are row numbers 0 to 1"),
        "missing row": (lambda c: c.reorder([0, 2]), r"rows=\[0, 2\]: allowed are row numbers 0 to 1"),
        "negative row": (lambda c: c.reorder([-1]), r"rows=\[-1\]"),
        "no copy": (lambda c: c.fork(0), "copies=0: allowed are integers from 1"),
    }


def test_a_refused_call_changes_nothing(nano):
    cache = nano.new_cache(2, 60, rewind=3)
    nano(draw(2, 50), cache=cache)
    before = held(cache)
    for name, (call, message) in refused(nano).items():
        with pytest.raises((ValueError, IndexError), match=message):
            call(cache)
        assert_untouched(cache, before), name


def test_a_draft_cache_is_not_one_of_the_model(nano):
    cache = nano.new_draft_cache(1, 20)
    before = held(cache)
    with pytest.raises(ValueError, match="made by new_draft_cache: this call needs one of new_cache"):
        nano(draw(1, 5), cache=cache)
    assert_untouched(cache, before)


def test_sizes_are_checked(nano):
    for arguments, message in (
        ((0, 5), "batch_size=0: allowed are integers from 1"),
        ((1, 0), "max_length=0: allowed are integers from 1"),
        ((1, 8193), "max_length=8193: the configuration allows max_position_embeddings=8192"),
    ):
        with pytest.raises(ValueError, match=message):
            nano.new_cache(*arguments)
    with pytest.raises(ValueError, match="rewind=-1: allowed are integers from 0"):
        nano.new_cache(1, 5, rewind=-1)
    with pytest.raises(ValueError, match="this model has no MTP module"):
        make(num_nextn_predict_layers=0).new_draft_cache(1, 5)
    with pytest.raises(ValueError, match="lengths needs a cache"):
        nano(draw(1, 5), lengths=[5])


class Interrupted(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def interrupt(model, layer, call):
    """Runs the call, which ends in the given layer, after its attention has appended to the cache."""

    def stop(*_):
        raise Interrupted

    hook = model.layers[layer].ffn_norm.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        call()
    hook.remove()


@pytest.mark.parametrize("size", [1, 6, 40], ids=["in place", "m crossed", "new buffers"])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_an_interrupted_call_leaves_no_trace(remembering, layer, size):
    """Whatever was appended before the interruption is forgotten: the same calls give the same bits afterwards."""
    ids = draw(2, 110)
    disturbed, quiet = (remembering.new_cache(2, 110, rewind=4) for _ in range(2))
    for cache in (disturbed, quiet):
        feed(remembering, cache, ids[:, :57], [20, 1])
        cache.truncate(55)
    wrong = draw(2, size, seed=1)
    interrupt(remembering, layer, lambda: remembering(wrong, cache=disturbed))
    interrupt(remembering, layer, lambda: remembering(wrong, cache=disturbed, lengths=[size, 0]))
    assert disturbed.lengths.tolist() == [55, 55]
    for cache in (disturbed, quiet):
        cache.truncate([53, 54])
    out = [feed(remembering, cache, ids[:, 55:90], [1, 5]) for cache in (disturbed, quiet)]
    assert torch.equal(*out)
    for name, value in held(disturbed).items():
        assert name.startswith("layer") or torch.equal(value, held(quiet)[name]), name


def test_an_interrupted_truncation_or_reorder_leaves_no_trace(nano, monkeypatch):
    from abyssal.model.cache import Tail

    cache = nano.new_cache(2, 60, rewind=4)
    nano(draw(2, 50), cache=cache)
    before = held(cache)
    calls = []

    def failing(tail, counts):
        calls.append(tail)
        if len(calls) == 3:
            raise Interrupted
        original(tail, counts)

    original = Tail.drop
    monkeypatch.setattr(Tail, "drop", failing)
    for wanted in (48, [48, 47]):
        calls.clear()
        with pytest.raises(Interrupted):
            cache.truncate(wanted)
        assert_untouched(cache, before)


# what it costs


def test_bytes_do_not_grow_while_it_fills(nano):
    cache = nano.new_cache(2, 200, rewind=3)
    reserved = cache.nbytes()
    for size in (1, 60, 30, 1, 1):
        nano(draw(2, size), cache=cache)
        assert cache.nbytes() == reserved
    nano(draw(2, 30), cache=cache, lengths=[30, 4])
    cache.truncate([122, 97])
    assert cache.nbytes() == reserved


def test_a_decoded_token_copies_no_store(nano):
    """Entries stay where they are: growth costs what is new."""
    cache = nano.new_cache(1, 200)
    nano(draw(1, 100), cache=cache)
    stores = [layer.compressor.store.rows.data_ptr() for layer in cache.layers if layer.compressor]
    for _ in range(50):
        nano(draw(1, 1), cache=cache)
    assert stores == [layer.compressor.store.rows.data_ptr() for layer in cache.layers if layer.compressor]


def test_nothing_is_differentiated(nano):
    with torch.enable_grad():
        out = nano(draw(1, 5), cache=nano.new_cache(1, 5))
    assert not out.logits.requires_grad and not out.streams.requires_grad


def test_half_precision_follows_its_own_full_pass(nano):
    """In bfloat16 rounding differs between splits: as far as two full passes of different precision at most."""
    model = make().bfloat16()
    ids = draw(1, 100)
    exact, full = nano(ids).logits, model(ids).logits
    cache = model.new_cache(1, 100)
    assert {rows.dtype for layer in cache.layers for _, rows in layer.tensors()} == {torch.bfloat16, torch.float32}
    assert_same("bfloat16 logits", feed(model, cache, ids, [37, 1, 1]), full, 2 * rms_error(full, exact))


def rms_error(got, want):
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


@pytest.mark.parametrize("storage", ["exact", "released"])
def test_a_cache_that_has_grown_is_a_larger_one(nano, storage):
    ids = draw(2, 90)
    small, large = (nano.new_cache(2, length, storage=storage) for length in (40, 90))
    feed(nano, small, ids[:, :40], [30, 10])
    small.grow(30)
    assert small.max_length == 40
    small.grow(90)
    assert small.max_length == 90 and small.nbytes() == large.nbytes()
    feed(nano, large, ids[:, :40], [30, 10])
    assert torch.equal(feed(nano, small, ids[:, 40:], [49, 1]), feed(nano, large, ids[:, 40:], [49, 1]))
    with pytest.raises(ValueError, match="max_length=9000: the configuration allows max_position_embeddings=8192"):
        small.grow(9000)
