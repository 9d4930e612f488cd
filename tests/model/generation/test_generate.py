"""Generation on the cache against generation that reads the whole sequence anew for every token."""

import pytest
import torch
from lively import draw_ids, lively

from abyssal.model import generate
from abyssal.model.generation.sampling import Draws, Sampling, pick

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model():
    return lively(num_hidden_layers=3, compress_ratios=[0, 4, 16])


@pytest.fixture(scope="module")
def prompts():
    """Lengths around the window of 16 and the ratios 4 and 16."""
    return [draw_ids(n, seed=n).tolist() for n in (37, 1, 16, 5)]


@torch.no_grad()
def recompute(model, prompt, count, sampling=None, seed=0, row=0):
    """The oracle: no cache, one full pass per token."""
    sampling, draws = sampling or Sampling(0), Draws(seed, row + 1)
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(pick(sampling.probabilities(logits), draws.uniform([row]))))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Greedy tokens of each prompt on its own."""
    return [generate(model, prompt, max_new_tokens=20, **GREEDY) for prompt in prompts]


def test_greedy_equals_recomputing_everything(model):
    prompt = draw_ids(21, seed=5)
    assert generate(model, prompt, max_new_tokens=60, **GREEDY) == recompute(model, prompt.tolist(), 60)


def test_sampling_equals_recomputing_everything(model, prompts):
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02}
    want = recompute(model, prompts[0], 12, Sampling(**settings), seed=11)
    assert generate(model, prompts[0], max_new_tokens=12, seed=11, chunk=9, **settings) == want


def test_every_kind_of_prompt(model, prompts, alone):
    ids, want = torch.tensor(prompts[0]), alone[0][:3]
    for prompt in (ids, ids[None], ids.int(), tuple(prompts[0]), list(ids), ids.numpy()):
        assert generate(model, prompt, max_new_tokens=3, **GREEDY) == want
    for batch in ([prompts[0]], [ids], (ids,), [ids.numpy()]):
        assert generate(model, batch, max_new_tokens=3, **GREEDY) == [want]
    nine = generate(model, list(range(9)), max_new_tokens=3, **GREEDY)
    assert generate(model, range(9), max_new_tokens=3, **GREEDY) == nine


@pytest.mark.parametrize("chunk", [None, 7])
def test_ragged_batch_equals_single_rows(model, prompts, alone, chunk):
    assert generate(model, prompts, max_new_tokens=20, chunk=chunk, **GREEDY) == alone


def test_even_batch_equals_single_rows(model, prompts):
    rows = [draw_ids(18, seed=s).tolist() for s in (1, 2, 3)]
    assert generate(model, rows, max_new_tokens=6, **GREEDY) == [
        generate(model, row, max_new_tokens=6, **GREEDY) for row in rows
    ]


def test_rows_draw_from_their_own_numbers(model, prompts):
    """Row i of a batch draws what row i draws in any batch; equal prompts in two rows go different ways."""
    rows = [prompts[0], prompts[0], prompts[2]]
    out = generate(model, rows, max_new_tokens=8, seed=4)
    assert out[0] == generate(model, rows[0], max_new_tokens=8, seed=4)
    assert out[:2] == generate(model, rows[:2], max_new_tokens=8, seed=4)
    assert out[0] != out[1]
    assert out[2] == recompute(model, rows[2], 8, Sampling(), seed=4, row=2)


def test_rows_keep_their_numbers_when_others_end(model, prompts):
    rows = [prompts[2], prompts[0], prompts[3]]
    free = generate(model, rows, max_new_tokens=8, seed=4)
    last = next(i for i in range(8) if free[0][i] not in free[1] + free[2] + free[0][:i])
    want = [free[0][: last + 1], *free[1:]]
    assert last < 7 and generate(model, rows, max_new_tokens=8, seed=4, stop=[free[0][last]]) == want


def test_seeds(model, prompts):
    one, again, other = (generate(model, prompts[0], max_new_tokens=5, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert generate(model, prompts[0], max_new_tokens=5) != generate(model, prompts[0], max_new_tokens=5)


def test_stop_tokens_and_sequences(model, prompts, alone):
    text = alone[0]
    last = next(i for i in range(5, 20) if text[i] not in text[:i])
    cut = text[: last + 1]
    never = next(i for i in range(260) if i not in text)

    def stopped(stop, **options):
        return generate(model, prompts[0], max_new_tokens=20, stop=stop, **GREEDY, **options)

    assert stopped([text[last]]) == cut
    assert stopped([never, [text[last - 1], text[last]]]) == cut
    assert stopped(torch.tensor([text[last]])) == cut
    assert stopped((tuple(text[: last + 1]),)) == cut
    assert stopped([[text[last], text[last - 1]]]) == text or text[last - 1] == text[last + 1]
    assert stopped([[never, text[0]], [prompts[0][-1], text[0]]]) == text, "a stop must be written, not given"
    assert stopped([[text[last - 1], text[last]]], speculative=True) == cut
    assert list(stopped([text[last]], stream=True)) == cut


@pytest.mark.parametrize("speculative", [False, True])
def test_the_end_of_text_token_stops_by_default(alone, prompts, speculative):
    end = alone[0][7]
    model = lively(eos_token_id=end, num_hidden_layers=3, compress_ratios=[0, 4, 16])
    options = {"max_new_tokens": 20, "speculative": speculative, **GREEDY}
    assert generate(model, prompts[0], **options) == alone[0][: alone[0].index(end) + 1]
    assert generate(model, prompts[0], stop=(), **options) == alone[0]


def test_rows_stop_on_their_own(model, prompts, alone):
    """Rows leave the batch one after the other; the rest go on as if alone."""
    stop = [alone[1][3], alone[3][9:11], alone[2][15]]
    want = [generate(model, prompt, max_new_tokens=20, stop=stop, **GREEDY) for prompt in prompts]
    assert len({len(row) for row in want}) >= 3, "the rows were to end at different steps"
    assert generate(model, prompts, max_new_tokens=20, stop=stop, **GREEDY) == want
    steps = list(generate(model, prompts, max_new_tokens=20, stop=stop, stream=True, **GREEDY))
    for row in range(4):
        column = [step[row] for step in steps]
        assert column == want[row] + [None] * (len(steps) - len(want[row]))
    assert any(token is not None for token in steps[-1])


@pytest.mark.parametrize("speculative", [False, True])
def test_streaming_equals_not_streaming_and_counts(model, prompts, speculative):
    options = {"max_new_tokens": 15, "seed": 3, "speculative": speculative}
    stream = generate(model, prompts[0], stream=True, **options)
    assert stream.stats.new_tokens == 0 and stream.stats.prefill_seconds == 0, "nothing is done before it is asked for"
    first = next(stream)
    assert stream.stats.new_tokens == 1 and stream.stats.prefill_seconds > 0 == stream.stats.decode_seconds
    written = [first, *stream]
    assert written == generate(model, prompts[0], **options)
    stats = stream.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (37, 15) and all(type(token) is int for token in written)
    assert stats.tokens_per_second == pytest.approx(14 / stats.decode_seconds)
    assert stats.prefill_tokens_per_second == pytest.approx(37 / stats.prefill_seconds)
    cache = model.new_cache(1, 37 + 15, rewind=int(speculative)).nbytes()
    assert stats.cache_bytes == cache + (model.new_draft_cache(1, 37 + 15).nbytes() if speculative else 0)
    assert "37 tokens" in str(stats) and "15 new" in str(stats) and "cache" in str(stats)
    assert (stats.acceptance_rate is None) != speculative and ("drafts accepted" in str(stats)) == speculative


def test_stats_of_a_batch(model, prompts):
    stream = generate(model, prompts, max_new_tokens=5, stream=True, seed=0)
    steps = list(stream)
    assert len(steps) == 5 and all(len(step) == 4 for step in steps)
    assert (stream.stats.prompt_tokens, stream.stats.new_tokens, stream.stats.first_tokens) == (59, 20, 4)


@pytest.mark.parametrize("speculative", [False, True])
def test_no_new_tokens_and_one(model, prompts, speculative):
    assert generate(model, prompts[0], max_new_tokens=0, speculative=speculative) == []
    assert generate(model, prompts[:1], max_new_tokens=0, speculative=speculative) == [[]]
    one = generate(model, prompts[0], max_new_tokens=1, speculative=speculative, **GREEDY)
    assert one == recompute(model, prompts[0], 1)


def test_up_to_the_longest_position():
    short = lively(max_position_embeddings=24)
    assert len(generate(short, draw_ids(20), max_new_tokens=4, **GREEDY)) == 4
    assert len(generate(short, draw_ids(20), max_new_tokens=4, speculative=True, **GREEDY)) == 4
    with pytest.raises(ValueError, match=r"20 tokens with max_new_tokens=5.*max_position_embeddings=24"):
        generate(short, draw_ids(20), max_new_tokens=5)
    with pytest.raises(ValueError, match="25 tokens"):
        generate(short, [[1], [2] * 25], max_new_tokens=1)


def test_gradients_are_not_recorded_and_training_mode_is_left_alone(model, prompts):
    model.train()
    generate(model, prompts[0], max_new_tokens=2, speculative=True)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()


@pytest.mark.parametrize("prompt, options, error, message", [
    ([], {}, ValueError, "prompt"),
    (torch.zeros(0).long(), {}, ValueError, "prompt"),
    (torch.zeros(1, 0).long(), {}, ValueError, "prompt"),
    ([[1, 2], []], {}, ValueError, r"prompt\[1\]"),
    (torch.zeros(2, 3).long(), {}, ValueError, r"\(2, 3\).*a batch is a list of rows"),
    (torch.zeros(1, 2, 3).long(), {}, ValueError, r"\(1, 2, 3\)"),
    ([1, 2.5], {}, TypeError, "2.5"),
    (torch.tensor([1.0]), {}, TypeError, "float32"),
    ("abc", {}, TypeError, "'a'"),
    ([1, [2]], {}, TypeError, r"\[2\]"),
    ([1, 260], {}, IndexError, "prompt holds token id 260.*0 to 259"),
    ([[1], [2, -1]], {}, IndexError, r"prompt\[1\] holds token id -1"),
    ([1], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1"),
    ([1], {"max_new_tokens": 9000}, ValueError, "max_position_embeddings=8192"),
    ([1], {"temperature": -1.0}, ValueError, "temperature=-1"),
    ([1], {"top_p": 0.0}, ValueError, "top_p=0"),
    ([1], {"top_k": -3}, ValueError, "top_k=-3"),
    ([1], {"min_p": 1.5}, ValueError, "min_p=1.5"),
    ([1], {"chunk": 0}, ValueError, "chunk=0"),
    ([1], {"stop": [260]}, ValueError, "260.*0 to 259"),
    ([1], {"stop": [[]]}, ValueError, "at least one"),
    ([1], {"stop": 5}, TypeError, "stop=5"),
    ([1], {"stop": ["\n"]}, TypeError, "stop"),
    ([[1], [2]], {"speculative": True}, ValueError, "speculative=True with a batch of 2"),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_at_once(model, prompt, options, error, message, stream):
    with pytest.raises(error, match=message):
        generate(model, prompt, stream=stream, **options)


def test_speculation_needs_an_mtp_module():
    plain = lively(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match=r"speculative=True.*num_nextn_predict_layers=0"):
        generate(plain, [1], speculative=True)


@pytest.mark.parametrize("kept", [1, 15, 37, 41])
def test_a_cache_that_holds_a_beginning_gives_the_same_tokens(model, prompts, alone, kept):
    cache = model.new_cache(1, 80, rewind=48)
    conversation = [*prompts[0], *alone[0]]
    generate(model, conversation[:41], max_new_tokens=9, cache=cache, **GREEDY)
    assert cache.lengths.tolist() == [41 + 9 - 1]
    cache.truncate(kept)
    prompt = conversation[: max(37, kept + 1)]
    want = generate(model, prompt, max_new_tokens=20, **GREEDY)
    written = generate(model, prompt, max_new_tokens=20, cache=cache, stream=True, **GREEDY)
    assert list(written) == want and written.stats.prompt_tokens == len(prompt) - kept


def test_a_cache_that_does_not_fit(model, prompts):
    cache = model.new_cache(1, 40)
    with pytest.raises(ValueError, match=r"cache holds 0 tokens of max_length=40: .* of 37 .* max_new_tokens=4"):
        generate(model, prompts[0], max_new_tokens=4, cache=cache)
    model(torch.tensor([prompts[0]]), cache=cache)
    with pytest.raises(ValueError, match=r"cache holds 37 tokens .* must be longer"):
        generate(model, prompts[0], max_new_tokens=1, cache=cache)
    for prompt, batch in (([prompts[0], prompts[0]], 1), (prompts[0], 2)):
        with pytest.raises(ValueError, match="one row, one prompt and no speculation"):
            generate(model, prompt, max_new_tokens=1, cache=model.new_cache(batch, 80))
