"""The long run on a short sequence: the stopwatch adds up, probes leave no trace, the report says what was measured."""

import json
from functools import partial
from itertools import pairwise

import pytest
import torch

from abyssal.kernels.watch import is_watched
from abyssal.model import ModelConfig, Transformer, generate
from abyssal.model.cache import Step
from abyssal.model.decode import decoder
from abyssal.train.data.corpus import load_corpus
from abyssal.train.data.tokenizers import BOS, ByteTokenizer
from abyssal.train.measure import long_context
from abyssal.train.measure.long_context import Stopwatch, long_text, main, measure, report, timed


def nano(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **changes})).eval()


def draw(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))


def test_a_part_has_its_own_time_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(long_context.time, "perf_counter", lambda: now[0])
    watch = Stopwatch({"op": (None, "op"), "inner": ("CSA", "inner"), "run": ("model", "run")})

    def spend(seconds, what, *calls):
        watch.begins(what)
        now[0] += seconds
        for call in calls:
            call()
        watch.ends(what)

    op = partial(spend, 3, "op")
    inner = partial(spend, 1, "inner", partial(spend, 0.5, "unknown"), op)
    spend(2, "run", inner, op)
    assert watch.seconds == {("model", "run"): 2, ("model", "op"): 3, ("CSA", "inner"): 1.5, ("CSA", "op"): 3}
    now[0] += 100
    inner()
    assert watch.seconds == {("model", "run"): 2, ("model", "op"): 3, ("CSA", "inner"): 3, ("CSA", "op"): 6}


PARTS = {
    *(f"{kind}: {part}" for kind in ("CSA", "HCA", "sliding") for part in ("norms", "projections", "attention")),
    *("CSA: compressor", "HCA: compressor", "CSA: indexer", "CSA: index top-k", "model: embedding, streams, head"),
    *("every layer: mHC", "every layer: experts", "every layer: Engram"),
}


def test_a_part_that_fails_is_timed_and_the_model_is_put_back():
    model = nano()
    with timed(model) as watch:
        model(draw(1, 20))
        assert {f"{kind}: {part}" for kind, part in watch.seconds} == PARTS
        with pytest.raises(IndexError):
            model(draw(1, 20) + 300)
        assert watch._running == []
    assert not is_watched()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_parts_of_a_decoded_token():
    """The same by the modules and in numpy, where the model must find no hooks that would keep it from numpy."""
    model = nano()
    cache = model.new_cache(1, 120, rewind=1)
    model(draw(1, 100), cache=cache)
    for in_numpy in (True, False):
        model(draw(1, 1), cache=cache)
        cache.truncate(100)
        with timed(model, in_numpy) as watch:
            assert (decoder(model, Step([100], [1], 1)) is not None) == in_numpy
            model(draw(1, 1), cache=cache)
        cache.truncate(100)
        assert {f"{kind}: {part}" for kind, part in watch.seconds} == PARTS, in_numpy


@pytest.mark.parametrize("chunk, segments", [(7, 64), (7, 2), (1000, 64)])
def test_probes_leave_no_trace(chunk, segments, monkeypatch):
    """The text decoded at the end is that of plain greedy generation."""
    monkeypatch.setattr(long_context, "SEGMENTS", segments)
    model, ids = nano(), draw(1, 150)
    with torch.no_grad():
        model.head.weight.mul_(20)
    result = measure(model, ids, 30, chunk=chunk, marks=(40, 120, 149, 150, 4000), shown=False)
    assert result.text == [int(token) for token in generate(model, ids[0], max_new_tokens=30, temperature=0)]
    assert [piece.end for piece in result.decode] == [56, 136, 150, 180]
    assert [piece.tokens for piece in result.decode] == [16, 16, 1, 30]
    assert sum(piece.tokens for piece in result.prefill) == 150
    assert [piece.end for piece in result.prefill][-1] == 150 and {40, 120, 149} <= {p.end for p in result.prefill}
    assert result.cache == result.formula > 0
    for piece in (*result.prefill, *result.decode):
        assert 0 < sum(piece.parts.values()) <= piece.seconds


def test_the_report_names_every_part_and_the_ratio():
    result = measure(nano(), draw(1, 100), 4, chunk=32, marks=(50,), shown=False, name="nano")
    text = report(result)
    for words in (
        "prefill     100 tokens in",
        "per million tokens",
        "chunks of 32",
        "peak",
        "by the formula",
        "index top-k",
    ):
        assert words in text, words
    assert text.count("every layer: mHC") == 3
    shares = [line.split() for line in text.splitlines() if line.rstrip().endswith("%")]
    assert 0 < sum(float(line[-1].rstrip("%")) for line in shares) < 325  # of three pieces, rounded
    assert "decode at 100 takes" in text
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["tokens"] == 100 and stored["seconds_per_million_tokens"] == pytest.approx(1e4 * result.seconds)
    assert stored["prefill"][0]["parts"].keys() == result.prefill[0].parts.keys()


@pytest.mark.parametrize(
    "t, chunk, marks", [(1, 1, ()), (1000, 7, (4, 500)), (64, 100, (64,)), (10**6, 4096, (4096, 65536))]
)
def test_segments_cover_every_token_once(t, chunk, marks):
    found = long_context._segments(t, chunk, marks)
    assert found[0][0] == 0 and found[-1][1] == t
    assert all(end == start for (_, end), (start, _) in pairwise(found)) and all(a < b for a, b in found)
    assert {mark for mark in marks if mark < t} <= {end for _, end in found}
    assert len(found) <= 2 * long_context.SEGMENTS + len(marks)


def test_long_text_is_real_text_and_goes_round(texts):
    documents = load_corpus(str(texts))
    size = sum(1 + len(d.text) for part in (documents.train, documents.held_out) for d in part)
    ids = long_text(str(texts), size + 100)
    assert ids.shape == (1, size + 100) and ids.dtype == torch.int64 and ids[0, 0] == BOS
    assert torch.equal(ids[0, size:], ids[0, :100])
    assert ByteTokenizer().decode(ids[0, 1:200].tolist()) == documents.train[0].text.decode()[:199]


def test_the_command_writes_its_file(texts, tmp_path, capsys):
    out = tmp_path / "runs" / "long.json"
    arguments = ["--config", "nano", "--tokens", "9000", "--decode", "3", "--source", str(texts), "--out", str(out)]
    assert main([*arguments, "--chunk", "2048"]) == 0
    text = capsys.readouterr().out
    assert "prefill     9,000 tokens" in text and str(out) in text and "9,000 of 9,000 tokens" in text
    stored = json.loads(out.read_text("utf-8"))
    assert stored["config"] == "nano" and stored["cache"] == stored["formula"] and len(stored["text"]) == 3
    assert [piece["end"] for piece in stored["decode"]] == [4096 + 16, 9003]


def test_the_command_takes_a_checkpoint(tiny, texts, tmp_path, capsys):
    from abyssal.train.start import train

    run = tmp_path / "run"
    train(tiny("train.steps=1", "train.eval_every=0", "train.sample_tokens=0"), run, shown=False)
    out = tmp_path / "long.json"
    arguments = ["--checkpoint", str(run), "--tokens", "60", "--decode", "5", "--source", str(texts), "--out", str(out)]
    assert main(arguments) == 0
    from abyssal.train.run.load import load_trained

    model = load_trained(run)[0]
    prompt = long_text(str(texts), 60)[0]
    assert json.loads(out.read_text("utf-8"))["text"] == list(generate(model, prompt, max_new_tokens=5, temperature=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens=0: allowed are positive numbers"),
        (["--tokens", "9", "--decode", "0"], "decode=0: allowed are positive numbers"),
        (["--tokens", "9", "--chunk", "-1"], "chunk=-1: allowed are positive numbers"),
        (["--config", "nanoo"], "'nanoo' is no configuration"),
        (["--checkpoint", "nowhere"], "is no configuration"),
        (["--tokens", "9", "--source", "nowhere"], "data.source='nowhere'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["--config", "nano", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("long_context: ")
