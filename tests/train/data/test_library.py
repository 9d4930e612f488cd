"""Tokenizers of others, by layout: transformers' ids, text back, special tokens by name, bytes counted."""

import json
import math
import pickle
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import KINDS, TEXTS, fit, foreign, gpt2, t5, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lively import lively
from uniform import Uniform

from abyssal.train.data import mapped, opponents
from abyssal.train.data.corpus import Corpus, Document
from abyssal.train.data.rows import held_out
from abyssal.train.data.source import TextSource
from abyssal.train.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    LibraryTokenizer,
    bpe_size,
    canonical_ids,
    load_tokenizer,
    train_bpe,
)
from abyssal.train.run.checkpoint import find, tokenizer_of
from abyssal.train.settings import DataConfig
from abyssal.train.start import train
from abyssal.train.talk.dialogue import Reader, prompt
from abyssal.train.talk.voice import open_voice

each = pytest.mark.parametrize("kind", KINDS)
patient = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, max_examples=60)
ANY_BYTES = ("gpt2", "llama3", "v4", "llama2", "gemma", "mistral")  # without a normaliser that changes text
LEADS = {"llama2": True, "mistral": False, "t5": True, "bert": True}  # and whether behind special tokens too
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "array", "items": {"type": "integer"}}},
    "required": ["name", "n"],
}
SPELT = ["<s>", "</s>", "<|endoftext|>", "[SEP]", "<｜User｜>", "<think>", "<pad>", "<unk>", "[UNK]", "<｜▁pad▁｜>"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABYSSAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def known(folder) -> dict[str, LibraryTokenizer]:
    return {kind: foreign(folder / kind, kind) for kind in KINDS}


@each
def test_ids_and_text_are_those_of_transformers(known, folder, kind):
    from transformers import PreTrainedTokenizerFast

    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder / kind), known[kind]
    assert (theirs.eos_token_id or ours.eos) == ours.eos and (theirs.bos_token_id or ours.bos) == ours.bos
    for text in [*TEXTS, "", " x", "  two ", "x<｜User｜>y</s> z[SEP]w<|endoftext|> v", "Å\u0301 ﬁ\u3000x"]:
        ids = ours.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        if kind != "bert":  # whose decoder takes blanks away before some signs
            kept = [token for token in ids if token not in ours.special.values()]
            assert ours.decode(kept) == theirs.decode(kept)


@pytest.mark.parametrize("kind", ANY_BYTES)
@patient
@given(data=st.binary() | st.lists(st.text() | st.sampled_from(TEXTS + SPELT)).map(lambda each: "".join(each).encode()))
@example(b"\xf0\x9f\x98 \xed\xa0\x80 \xc0\x80 \xff")
@example(b"\xff x")
def test_any_bytes_round_trip(known, kind, data):
    tokenizer = known[kind]
    if (kind == "mistral" and data[:1] in (b" ", "▁".encode()[:1])) or "▁" in data.decode("utf-8", "ignore"):
        return  # a leading blank is the one put there, and ▁ is a blank
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode_bytes([tokenizer.bos, *ids]) == data
    assert b"".join(map(tokenizer.token_bytes, ids)).removeprefix(tokenizer.lead) == data
    assert tokenizer.decode_bytes(tokenizer.spell(data), continues=True) == data
    assert not {*ids} & {*tokenizer.special.values()}
    counts = [sum(part) for part in tokenizer.count_chunks([data])]
    assert sum(counts) == len(data)


@each
def test_text_that_spells_special_tokens_is_text(known, kind):
    tokenizer = known[kind]
    control = {*tokenizer.special.values()} - {tokenizer.special.get(name) for name in ("<unk>", "[UNK]")}
    for string in tokenizer.special:
        text = f"x{string}y {string}"
        assert not {*tokenizer.encode(text)} & control
        assert tokenizer.encode(text, special=True).count(tokenizer.special[string]) == 2
        if kind in ANY_BYTES and "▁" not in string:  # which is a blank to some
            assert tokenizer.decode(tokenizer.encode(text)) == text


@each
@patient
@given(ids=st.lists(st.integers(0, 420)), special=st.booleans(), continues=st.booleans())
def test_a_stream_is_the_text_in_pieces(known, kind, ids, special, continues):
    pieces = list(known[kind].decode_stream(iter(ids), special, continues))
    assert len(pieces) == len(ids) + 1
    assert "".join(pieces) == known[kind].decode(ids, special, continues)
    if special is False:
        ids = [token for token in ids if token not in known[kind].special.values()]
        assert continues is False or known[kind].decode_bytes(ids, continues=True) == b"".join(
            map(known[kind].token_bytes, ids)
        )


@pytest.mark.parametrize("kind", ["llama2", "mistral"])
def test_a_character_waits_for_its_last_byte_and_a_blank_is_kept_within_a_text(known, kind):
    tokenizer = known[kind]
    ids = tokenizer.encode("the €")
    assert (tokenizer.lead, tokenizer.leads_again) == (b" ", LEADS[kind])
    stream = [*tokenizer.decode_stream(ids)]
    assert "".join(stream) == "the €" and stream[-4:] == ["", "", "€", ""]
    assert tokenizer.decode(ids, continues=True) == " the €"
    assert tokenizer.decode([tokenizer.bos, *ids]) == "the €"
    again = tokenizer.decode([*ids, tokenizer.eos, *ids], special=True)
    assert again == f"the €</s>{'' if LEADS[kind] else ' '}the €"


@each
def test_documents_in_pieces_are_those_in_one(known, kind, monkeypatch):
    """Cut at line ends or within a character, nothing is put in between."""
    tokenizer, data = known[kind], "windows\n日本 the €\nrun".encode()
    whole = tokenizer.decode(tokenizer.encode_bytes(data))
    cuts = [(8,), *([(9, 12), (17,)] if kind not in ("t5", "bert") else ())]  # these put a blank before each word
    for cut in cuts:
        chunks = [data[a:b] for a, b in pairwise((0, *cut, len(data)))]
        ids = [token for part in tokenizer.encode_chunks(iter(chunks)) for token in part]
        assert tokenizer.decode(ids) == whole
        counts = [size for part in tokenizer.count_chunks(iter(chunks)) for size in part]
        assert len(counts) == len(ids) and sum(counts) == len(data)


def test_what_each_token_is_made_of(known):
    """Blanks between words count for the word behind, what is left of the text for its end."""
    tokenizer = known["bert"]
    text = "The  thé\n\n".encode()
    ids = tokenizer.encode_bytes(text)
    assert tokenizer.decode(ids) == "the the" and [*tokenizer.count_chunks([text])] in ([[3, 8]], [[3, 4, 2, 2]])
    tokenizer = known["llama2"]
    ids = tokenizer.encode("the 日")
    sizes = [len(tokenizer.token_bytes(token)) for token in ids]
    assert next(iter(tokenizer.count_chunks(["the 日".encode()]))) == [sizes[0] - 1, *sizes[1:]]
    euro = next(iter(tokenizer.count_chunks(["€".encode()])))
    assert sum(euro) == 3 and len(euro) == len(tokenizer.encode("€"))
    assert [*known["t5"].count_chunks([b"\n"])] == [[]], "no token: counted with the document's last"
    assert [*map(sum, known["t5"].count_chunks([b"\n", b"the"]))] == [0, 4], "or with the next"


def test_what_is_no_text_becomes_a_replacement_character(known):
    assert known["t5"].decode(known["t5"].encode_bytes(b"x\xffy")) == "x\ufffdy"
    assert known["t5"].decode(known["t5"].encode("a ♞")) == "a \ufffd"
    assert known["bert"].decode(known["bert"].encode("A ♞ b")) == "a \ufffd b"
    with pytest.raises(UnicodeEncodeError):
        known["t5"].encode("\ud800", special=True)


# special tokens ------------------------------------------------------------------------------------------------------


def test_the_released_layout(known):
    tokenizer = known["v4"]
    text = [token for token, piece in enumerate(tokenizer.pieces) if piece]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2) and text == list(range(3, text[-1] + 1))
    assert list(tokenizer.special.values()) == [0, 1, 2, *range(text[-1] + 1, tokenizer.vocab_size)]
    assert tokenizer.least == tokenizer.vocab_size
    chat = "<｜begin▁of▁sentence｜>hi<｜User｜>a</think>｜DSML｜"
    ids = tokenizer.encode(chat, special=True)
    control = ["<｜begin▁of▁sentence｜>", "<｜User｜>", "</think>", "｜DSML｜"]
    assert [token for token in ids if token not in text] == [tokenizer.special[string] for string in control]
    assert tokenizer.decode(ids, special=True) == chat and tokenizer.decode(ids) == "hia"
    assert len(set(canonical_ids(tokenizer, tokenizer.vocab_size + 1).tolist())) > len(tokenizer.special)


NAMED = [
    ({"bos_token": "<a>", "eos_token": {"content": "<b>"}, "pad_token": "<c>"}, {}, "abc"),
    ({}, {"bos_token": {"content": "<a>"}, "eos_token": "<b>"}, "abb"),
    ({"eos_token": "<b>", "bos_token": None}, {"bos_token": "<a>"}, "abb"),
    ({"eos_token": "<b>", "bos_token": None}, {}, "bbb"),
    ({"bos_token": "<a>", "eos_token": None}, {}, "aaa"),
    ({"cls_token": "<a>", "sep_token": "<b>"}, {}, "abb"),
    ({}, {}, "sdd"),
]


@pytest.mark.parametrize("config, others, roles", NAMED)
def test_special_tokens_by_name(tmp_path, config, others, roles):
    read = gpt2()[0]
    strings = {"a": "<a>", "b": "<b>", "c": "<c>", "s": "<s>", "d": "<|endoftext|>"}
    new = [string for string in strings.values() if string != "<|endoftext|>"]
    vocabulary = len(read["model"]["vocab"])
    read["added_tokens"] += [{"id": vocabulary + i, "content": s, "special": True} for i, s in enumerate(new)]
    for entry in read["added_tokens"]:
        entry.update(dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    write(tmp_path, read, config, **({"special_tokens_map.json": json.dumps(others)} if others else {}))
    tokenizer = load_tokenizer(tmp_path)
    found = tokenizer.bos, tokenizer.eos, tokenizer.pad
    assert found == tuple(tokenizer.special[strings[role]] for role in roles)


def test_special_tokens_of_the_configuration_alone(tmp_path):
    read = gpt2()[0]
    first = len(read["model"]["vocab"])
    config = {"added_tokens_decoder": {str(first): {"content": "<mine>", "special": True}}, "eos_token": "<mine>"}
    tokenizer = load_tokenizer(write(tmp_path, read, config))
    assert (tokenizer.eos, tokenizer.vocab_size) == (first, first + 1)
    assert tokenizer.encode("a<mine>", special=True)[-1] == first not in tokenizer.encode("a<mine>")
    config["additional_special_tokens"] = ["the"]
    config["extra_special_tokens"] = {"image": "x"}
    more = load_tokenizer(write(tmp_path / "more", read, config))
    assert {"x"} == more.special.keys() - tokenizer.special.keys() and more.digest != tokenizer.digest


def wrong(what):
    read, config = gpt2()
    if what == "none":
        read["added_tokens"][0]["content"] = "<other>"
        read["model"]["vocab"] = {
            token.replace("<|endoftext|>", "<other>"): i for token, i in read["model"]["vocab"].items()
        }
    elif what == "name":
        config = {"eos_token": "<nowhere>"}
    elif what == "gap":
        read["added_tokens"].append({"id": 999, "content": "<x>", "special": True})
    elif what == "decoder":
        read["decoder"] = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
    elif what == "model":
        del read["model"]["vocab"]
    elif what == "merges":
        read["model"]["merges"].append(["?!", "?!"])
    elif what == "config":
        config = [1]
    return read, config


@pytest.mark.parametrize("what, message", [
    ("none", "neither bos nor eos is known: tokenizer_config.json must name one of its tokens"),
    ("name", "eos_token='<nowhere>' of its files is none of its tokens"),
    ("gap", "id 999 of '<x>' is not the next one"),
    ("decoder", "decoder CTC: allowed are ByteFallback, ByteLevel, .* and none"),
    ("model", "no file of the tokenizers library: KeyError"),
    ("merges", r"tokenizer='.*': Token `\?!` out of vocabulary"),
    ("config", "tokenizer_config.json is no table"),
])  # fmt: skip
def test_a_file_that_is_none_is_an_error(tmp_path, what, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(write(tmp_path, *wrong(what)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_special_token_that_the_model_has_is_not_found_in_text(tmp_path):
    """Llama 3's models look for whole words; Unigram for any piece."""
    read = gpt2()[0]
    read["model"]["ignore_merges"] = True
    read["pre_tokenizer"]["use_regex"] = False
    whole = load_tokenizer(write(tmp_path / "whole", read))
    assert (
        whole.eos not in whole.encode("<|endoftext|>")
        and whole.decode(whole.encode("<|endoftext|>")) == "<|endoftext|>"
    )
    unigram = load_tokenizer(write(tmp_path / "unigram", *t5()))
    assert unigram.eos not in unigram.encode("</s>") and unigram.decode(unigram.encode("a</s>")) == "a</s>"


# files ---------------------------------------------------------------------------------------------------------------


@each
def test_its_files_come_back_unchanged(known, folder, tmp_path, kind):
    (folder / kind / "chat_template.jinja").write_text("{{ x }}", "utf-8")
    (folder / kind / "README.md").write_text("", "utf-8")
    tokenizer = load_tokenizer(folder / kind)
    tokenizer.save(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert saved == {p.name: p.read_bytes() for p in (folder / kind).iterdir() if p.name != "README.md"}
    for again in (
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert (again.digest, again.special, again.pieces) == (tokenizer.digest, tokenizer.special, tokenizer.pieces)
        assert again.digest == known[kind].digest
        assert again.encode("the x<｜User｜>", True) == tokenizer.encode("the x<｜User｜>", True)
    assert len({each.digest for each in known.values()}) == len(KINDS)


def test_bytes_have_files_that_transformers_reads(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (256, 257, 258)
    for text in [*TEXTS, "", " <｜User｜> a</think>", "\0\xad\x7f\u3000"]:
        ids = ours.encode(text, special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.encode(text) == [256, *ids]
        assert theirs.decode(ids) == text
    assert theirs("a", "b")["input_ids"] == [256, 97, 98]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert isinstance(load_tokenizer(path), ByteTokenizer)
    read = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    read["model"]["merges"] = [["a", "b"]]
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'abyssal\[text\]'"):
        load_tokenizer(write(tmp_path / "other", read))


def test_byte_pairs_put_bos_in_front_and_older_files_load(tmp_path):
    from transformers import AutoTokenizer

    ours = train_bpe([text.encode() for text in TEXTS * 3], 320)
    ours.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("the 日") == [ours.bos, *ours.encode("the 日")]
    read = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    read["post_processor"] = None
    older = load_tokenizer(write(tmp_path / "older", read))
    assert isinstance(older, BPETokenizer) and older.digest == ours.digest and older.pieces == ours.pieces
    assert older.encode("the 日") == ours.encode("the 日")


# held-out bytes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    texts = [
        "The  Ünï streams\n",
        " don't stop, ♞ ﬁ x\n",
        "日本 <think> the\x07\n\n",
        "</s>[SEP]<s> then\n",
        "\x07\n",
        "e\u0301nd\n\n",
    ]
    documents = [Document(f"d{i}", ((text + TEXTS[i]) * 4).encode()) for i, text in enumerate(texts)]
    return Corpus(tuple(documents[:3]), (*documents[3:], Document("z", b"\n\n"), Document("zz", b"\xff the x")))


@each
@pytest.mark.parametrize("rows", [0, 2])
def test_bits_per_byte_are_of_the_bytes_of_the_documents(known, corpus, kind, rows):
    tokenizer = known[kind]
    data = DataConfig(tokenizer=kind, sequence_length=8, held_out_rows=rows)
    source = TextSource(corpus, tokenizer, data, 0)
    targets = sum(int((batch.targets != -100).sum()) for batch in source.held_out.batches(3))
    size = source.held_out_bytes()
    scores = source.evaluate(Uniform(tokenizer.vocab_size), torch.float32)
    assert scores["held_out"] == pytest.approx(math.log2(tokenizer.vocab_size) * targets / size)
    plain = TextSource(corpus, ByteTokenizer(), DataConfig(sequence_length=8, held_out_rows=0), 0)
    total = sum(document.size for document in corpus.held_out)
    lost = 2 if kind in ("t5", "bert") else 0  # a document of which no token is made
    if not rows:
        assert size == total - lost
        assert lost or scores["trigram"] == pytest.approx(plain.trigram)
    else:
        assert 0 < size < total


@pytest.mark.parametrize("kind", ["llama2", "bert"])
def test_opponents_are_scored_on_the_bytes_of_the_chosen_tokens(known, corpus, kind, monkeypatch):
    monkeypatch.setattr(opponents, "kneser_ney", lambda train, text, orders: {3: np.arange(len(text))})
    source = TextSource(corpus, known[kind], DataConfig(tokenizer=kind, sequence_length=8, held_out_rows=0), 0)
    stream, start, chosen = source.held_out.stream, 0, []
    for token, size in zip(stream.tokens.tolist(), source.sizes.tolist()):
        if token == stream.bos:
            start += size == 0  # else a document of which no token is made, and nothing is scored
            continue
        chosen += range(start, start + size)
        start += size
    assert source.trigram == pytest.approx(np.mean(chosen)) and start == len(source.scored.stream)
    assert all(source.scored.stream[place] != 256 for place in chosen)


def test_a_cached_file_knows_its_bytes(known, corpus, monkeypatch):
    first = mapped.tokenised(corpus, known["bert"])
    monkeypatch.setattr(mapped, "_write_sizes", None)
    again = mapped.tokenised(corpus, known["bert"])
    assert first.held_out.sizes.tolist() == again.held_out.sizes.tolist() and again.train.sizes is None
    assert len(again.held_out.sizes) == len(again.held_out.tokens) == held_out(again, 8).stream.size


# training, text and chat ---------------------------------------------------------------------------------------------


def recipe_for(tiny, tokenizer, path, *more):
    ids = [f"model.{name}={value}" for name, value in fit(tokenizer).items()]
    return tiny(f"data.tokenizer='{path}'", *ids, f"model.engram.pad_token_id={tokenizer.pad}", *more)


@each
def test_a_run_with_it(known, folder, tiny, tmp_path, kind):
    tokenizer = known[kind]
    recipe = recipe_for(tiny, tokenizer, folder / kind, "train.steps=2", "train.sample_prompt='the'")
    done = train(recipe, tmp_path / "run", stop_at=1, shown=False)
    done = train(recipe, tmp_path / "run", resume=done.out, shown=False)
    assert 0 < done.scores["held_out"] < 20 and done.sample.startswith("the")
    kept = tokenizer_of(tmp_path / "run")
    assert kept.digest == tokenizer.digest and (find(done.out) / "tokenizer.json").is_file()
    voice = open_voice(tmp_path / "run", device="cpu")
    assert voice.tokenizer.digest == tokenizer.digest
    if kind == "v4":
        written = tokenizer.decode(prompt(voice, [{"role": "user", "content": "the"}]), special=True)
        assert written == "<｜begin▁of▁sentence｜><｜User｜>the<｜Assistant｜></think>"
    else:
        with pytest.raises(ValueError, match=r"has no <｜begin.*<｜User｜>, .*which the chat format is made of"):
            prompt(voice, [{"role": "user", "content": "the"}])


def test_the_model_must_have_room_and_the_same_bos(known, folder, tiny, tmp_path):
    tokenizer, least = known["v4"], known["v4"].vocab_size
    recipe = recipe_for(tiny, tokenizer, folder / "v4", f"model.vocab_size={least - 1}")
    special = r"\(bos_token_id is 0, eos_token_id is 1, pad_token_id 2\)"
    says = rf"model.vocab_size={least - 1}: allowed is at least {least} .*v4' {special}"
    with pytest.raises(ValueError, match=says):
        train(recipe, tmp_path / "run", shown=False)
    recipe = recipe_for(tiny, tokenizer, folder / "v4", "model.bos_token_id=5")
    with pytest.raises(
        ValueError, match=r"model.bos_token_id=5: allowed is 0, .*\(eos_token_id is 1, pad_token_id 2\)"
    ):
        train(recipe, tmp_path / "run", shown=False)
    padded = recipe_for(tiny, tokenizer, folder / "v4", f"model.vocab_size={least + 60}", "train.steps=1")
    train(padded, tmp_path / "run", shown=False)
    assert tokenizer.token_bytes(least + 7) == b"" and tokenizer.decode([least + 7]) == ""
    with pytest.raises(
        ValueError, match=f"tokenizer='.*qwen' has {known['qwen'].vocab_size} tokens .* vocabulary of 288"
    ):
        from abyssal.train.talk import voice

        voice._voice(lively(vocab_size=288), known["qwen"], "mine", None)


def test_text_goes_on_behind_a_prompt(known):
    tokenizer = known["llama2"]
    ids = tokenizer.encode("the x")
    answers = {}
    for begins in (None, True, False):
        reader = Reader(tokenizer, begins=begins)
        for token in ids:
            reader.feed(token)
        reader.finish()
        answers[begins] = reader.answer.content
    assert answers == {None: "the x", True: "the x", False: " the x"}
    first = Reader(known["mistral"])
    for token in known["mistral"].encode("the x"):
        first.feed(token)
    first.finish()
    assert first.answer.content == " the x", "it puts no blank behind special tokens"


@each
def test_json_from_any_of_them(known, kind):
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    from abyssal.model import generate
    from abyssal.model.text.constrain import Constraint, json_schema

    tokenizer = known[kind]
    model = lively(**{**fit(tokenizer), "num_hidden_layers": 2, "compress_ratios": [0, 4], "engram": None})
    constraint = Constraint(json_schema(SCHEMA), tokenizer)
    for seed in range(3):
        ids = generate(model, [tokenizer.bos], max_new_tokens=90, constraint=constraint, seed=seed, stop=())
        assert ids[-1] == tokenizer.eos
        text = tokenizer.decode(ids[:-1])
        jsonschema.validate(json.loads(text), SCHEMA)


def test_forced_text_is_spelt_as_the_tokenizer_writes_it(known):
    assert known["llama2"].spell(b"then") == known["llama2"].encode("xthen")[len(known["llama2"].encode("x")) :]
    assert known["bert"].decode_bytes(known["bert"].spell(b"{then"), continues=True) == b"{then"
    assert known["t5"].decode_bytes(known["t5"].spell(b"the\xff"), continues=True) == b"the"


def test_dropout_of_a_file_is_left_out(tmp_path):
    foreign(tmp_path, "gpt2")
    read = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    read["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(read), "utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("the same words again and again")) for _ in range(8)}) == 1


def test_what_makes_the_library_panic_is_one_line(tmp_path):
    foreign(tmp_path, "gpt2")
    read = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    panics = {"type": "Precompiled", "precompiled_charsmap": None}
    read["normalizer"] = {"type": "Sequence", "normalizers": [panics]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(read), "utf-8")
    with pytest.raises(ValueError, match="tokenizer="):
        load_tokenizer(tmp_path).encode("x")
    with pytest.raises(ValueError, match="up to 10,000,000"):
        bpe_size("bpe:99999999999")
