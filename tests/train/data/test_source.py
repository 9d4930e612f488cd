"""Text as a source: golden rows of bytes, rows of trained tokens, bits per byte whatever the tokens, and whole runs."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from uniform import Uniform

from abyssal.train.cli import main
from abyssal.train.data import opponents
from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.rows import held_out, train_rows
from abyssal.train.data.source import TextSource
from abyssal.train.data.tokenizers import BPETokenizer, ByteTokenizer
from abyssal.train.recipe import load_recipe
from abyssal.train.run.checkpoint import find, tokenizer_of
from abyssal.train.start import open_source, train

SIZE = 320
BPE = (
    f"data.tokenizer=bpe:{SIZE}",
    *(f"model.vocab_size={SIZE}", f"model.bos_token_id={SIZE - 32}", f"model.eos_token_id={SIZE - 31}"),
    *(f"model.pad_token_id={SIZE - 30}", f"model.engram.pad_token_id={SIZE - 30}"),
)


def test_rows_of_bytes_are_those_of_the_first_release():
    """SHA-256 of batches as the first version of this code made them."""

    def documents(first: int, count: int) -> tuple[Document, ...]:
        draw = np.random.default_rng(first)
        sizes = (int(draw.integers(1, 200)) for _ in range(count))
        return tuple(
            Document(f"d{first + i}", draw.integers(0, 256, size, np.uint8).tobytes()) for i, size in enumerate(sizes)
        )

    corpus, sha = Corpus(documents(0, 40), documents(1000, 9)), hashlib.sha256()
    steps = ((16, 4, 0, 0), (16, 4, 0, 70), (64, 8, 3, 5), (64, 8, 3, 400), (333, 2, 1, 9))  # length, b, seed, step
    batches = [train_rows(corpus, length, seed, range(step * b, (step + 1) * b)) for length, b, seed, step in steps]
    batches += [batch for rows in (0, 5) for batch in held_out(corpus, 32, rows).batches(3)]
    for batch in batches:
        for tensor in (batch.ids, batch.targets, batch.documents):
            sha.update(tensor.numpy().tobytes())
    assert sha.hexdigest() == "db19850a7dae75280fa038b7d96bca5bf758f5e721363a12e7ce9f1857fcdc08"


def test_trained_tokens_spell_the_bytes_of_the_corpus(tiny):
    source = open_source(tiny(*BPE))
    assert isinstance(source, TextSource) and isinstance(source.tokenizer, BPETokenizer)
    assert (source.vocabulary, source.tokenizer.bos) == (SIZE - 31, SIZE - 32)
    rows = held_out(source.tokens, 48).batches(4)
    targets = torch.cat([batch.targets[batch.targets != -100] for batch in rows]).tolist()
    assert source.tokenizer.decode_bytes(targets) == b"".join(d.text for d in source.corpus.held_out)
    assert len(targets) < 0.8 * sum(d.size for d in source.corpus.held_out)
    batch = source.batch(range(30), 48)
    assert int(batch.ids.max()) == source.tokenizer.bos and int(batch.targets.max()) < source.tokenizer.bos


def test_mapped_bytes_give_the_same_run(tiny):
    plain, there = open_source(tiny()), open_source(tiny("data.mapped=true"))
    assert plain.digest == there.digest and isinstance(there.tokens.train.tokens, np.memmap)
    for stage in (0, 1):
        one, other = (source.batch(range(7, 12), 48, stage) for source in (plain, there))
        assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("rows", [0, 3])
def test_held_out_loss_is_per_byte_whatever_the_tokens(tiny, rows):
    source = open_source(tiny(*BPE, f"data.held_out_rows={rows}"))
    targets = torch.cat([batch.targets.flatten() for batch in source.held_out.batches(2)])
    targets = targets[targets != -100].tolist()
    spelt = source.tokenizer.decode_bytes(targets)
    scores = source.evaluate(Uniform(SIZE), torch.float32)
    assert scores["held_out"] == pytest.approx(math.log2(SIZE) * len(targets) / len(spelt))
    assert source.held_out_bytes() == len(spelt)
    plain = open_source(tiny(f"data.held_out_rows={rows}"))
    assert plain.evaluate(Uniform(260), torch.float32)["held_out"] == pytest.approx(math.log2(260))
    assert plain.held_out_bytes() == len(plain.held_out.target_positions())
    if not rows:
        assert scores["trigram"] == pytest.approx(plain.trigram), "all rows: the same bytes"


def test_opponents_are_scored_on_the_bytes_of_the_chosen_rows(tiny, monkeypatch):
    monkeypatch.setattr(opponents, "kneser_ney", lambda train, text, orders: {3: np.arange(len(text))})
    source = open_source(tiny(*BPE))
    stream, tokenizer = [], source.tokenizer
    for document in source.scored.documents:
        stream += [256, *document.text]
    spans, place = [], 0  # token by token: where its bytes lie in the stream of bytes
    for token in source.held_out.stream.tokens.tolist():
        width = 1 if token == tokenizer.bos else len(tokenizer.token_bytes(token))
        spans.append(range(place, place + width))
        place += width
    assert source.scored.stream.tolist() == stream and place == len(stream)
    chosen = [i for position in source.held_out.target_positions().tolist() for i in spans[position]]
    assert 256 not in [stream[i] for i in chosen]
    assert source.trigram == pytest.approx(np.mean(chosen))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.tokenizer=bpe:320"], "model.vocab_size=260: allowed is at least 289 .*for data.tokenizer='bpe:320'"),
        ([*BPE, "model.bos_token_id=256"], r"model.bos_token_id=256: allowed is 288, .*\(eos_token_id is 289, pad"),
        (["data.tokenizer=bpe:288"], "tokenizer='bpe:288': allowed after 'bpe:' is a size above 288"),
        (["data.tokenizer=bpe:x"], "tokenizer='bpe:x'"),
        (["model.vocab_size=288", "model.bos_token_id=1"], "model.bos_token_id=1: allowed is 256"),
    ],
)
def test_a_bad_tokenizer_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("nano", overrides)


def test_conversations_are_in_bytes():
    with pytest.raises(ValueError, match=r"data.tokenizer='bpe:320': allowed with \[reason\] is bytes"):
        load_recipe("reason-sft", ["data.tokenizer=bpe:320"])


def test_a_tokenizer_given_by_path_has_to_fit(tiny, tmp_path):
    open_source(tiny(*BPE)).tokenizer.save(tmp_path)
    given = [f"data.tokenizer='{tmp_path}'", *BPE[1:]]
    assert open_source(tiny(*given)).batch(range(2), 48).ids.shape == (2, 48)
    with pytest.raises(ValueError, match=r"model.vocab_size=260: allowed is at least 289"):
        open_source(tiny(given[0]))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_source(tiny("data.tokenizer=nowhere"))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Four steps on trained tokens."""
    out = tmp_path_factory.mktemp("runs") / "bpe"
    summary = train(tiny(*BPE, "train.steps=4", "train.checkpoint_every=2"), out, shown=False)
    assert summary.sample.startswith("def ")
    return out


def test_a_checkpoint_carries_its_tokenizer(run, tiny):
    folder = find(run)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}
    assert tokenizer_of(run).digest == open_source(tiny(*BPE)).tokenizer.digest
    begun = json.loads((run / "run.json").read_text("utf-8"))["starts"][0]
    assert tokenizer_of(run).digest in begun["data"]["digest"]


def test_a_run_of_trained_tokens_resumes_to_the_same_bits(run, tiny, tmp_path):
    recipe = tiny(*BPE, "train.steps=4", "train.checkpoint_every=2")
    train(recipe, tmp_path / "cut", stop_at=2, shown=False)
    train(recipe, tmp_path / "cut", resume=tmp_path / "cut", shown=False)
    weights = [(find(out) / "model.safetensors").read_bytes() for out in (run, tmp_path / "cut")]
    assert weights[0] == weights[1]


def test_a_resumed_run_keeps_its_tokenizer(run, tiny, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    recipe = tiny(*BPE, "train.steps=5")
    folder = find(tmp_path / "copy")
    other = open_source(tiny(*BPE, "data.held_out_fraction=0.5")).tokenizer
    assert other.digest != tokenizer_of(run).digest
    other.save(folder)
    with pytest.raises(ValueError, match=r"data.tokenizer='bpe:320' is not the tokenizer of .*: go on with its own"):
        train(recipe, tmp_path / "copy", resume=tmp_path / "copy", shown=False)
    own = replace(recipe, data=replace(recipe.data, tokenizer=str(folder)))
    assert train(own, tmp_path / "copy", resume=tmp_path / "copy", shown=False).progress.step == 5


def test_commands_use_the_runs_tokenizer(run, capsys):
    assert main(["generate", str(run), "--prompt", "the ", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("the ") and len(whole) > len("the ") + 5, "tokens are longer than bytes"
    written = whole[4:-1]
    stop = written[3:5]
    assert main(["generate", str(run), "--prompt", "the ", "--max-new-tokens", "5", "--temperature", "0",
                 "--stop", stop, "--stop", "never"]) == 0  # fmt: skip
    assert capsys.readouterr().out == "the " + written[: written.index(stop) + 2] + "\n"
    assert main(["eval", str(run)]) == 0
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert f"held-out bits per byte   {last['held_out']:.4f}" in capsys.readouterr().out
    assert main(["eval", "speculative", str(run), "--prompts", "1", "--tokens", "5"]) == 0
    assert main(["eval", "needle", str(run), "--lengths", "128", "--depths", "0", "--trials", "1"]) == 2
    assert "reads tokens of" in (said := capsys.readouterr().err) and "a needle is planted in bytes" in said


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["cd"], ["ab", "cde", "f"], ["ab", "cd"]),
        (["bcd", "never"], ["ab", "c", "def", "bcd"], ["ab", "c", "d"]),
        (["f", "e"], ["a", "cdef"], ["a", "cde"]),
        (["aa"], ["a", "ba", "c"], ["a", "ba", "c"]),
        ([], ["a", "b"], ["a", "b"]),
    ],
)
def test_text_ends_where_a_stop_does_whatever_the_pieces(stops, pieces, shown):
    from abyssal.train.cli.generate import _until

    assert list(_until(stops, iter(pieces))) == shown


def test_a_run_can_be_talked_to(run):
    from abyssal.train.talk.voice import open_voice

    assert open_voice(run, device="cpu").tokenizer.digest == tokenizer_of(run).digest
    assert isinstance(open_voice(run, "bytes", device="cpu").tokenizer, ByteTokenizer)


def test_a_planted_run_spells_no_text(tmp_path, capsys):
    small = ["data.source=planted:recall", "data.sequence_length=64", "data.held_out_rows=1", "train.steps=1"]
    train(load_recipe("nano", [*small, "train.eval_every=0"]), tmp_path / "run", shown=False)
    for command in ("generate", "chat"):
        assert main([command, str(tmp_path / "run")]) == 2
        assert "was trained on planted:recall: its tokens spell no text" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run")]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert f"held-out answers right   {last['accuracy']:.1%}\n" in capsys.readouterr().out
