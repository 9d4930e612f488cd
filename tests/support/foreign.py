"""Tokenizers as others lay them out, small ones: trained on a few lines, written as their files are."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from abyssal.train.data.tokenizers import LibraryTokenizer, load_tokenizer

TEXTS = [
    "def é(x):\n    return x<think>", "the then there", "Größe 日本語 日本", "    \n\n\tif x: return x\n",
    '{"name": 1, "b": [true, null]}', "The Quick don't, stop.", "streams of tokens run through windows\n",
]  # fmt: skip
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
ALPHABET = pre.ByteLevel.alphabet()


def _trained(tokenizer: Tokenizer, trainer: Any) -> dict[str, Any]:
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return json.loads(tokenizer.to_str())


def _bytes(cut: Any, size: int = 320, **more: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(ignore_merges=more.pop("ignore_merges", False)))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    return _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=size, initial_alphabet=ALPHABET, show_progress=False, **more)
    )


def _add(read: dict[str, Any], *strings: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    vocabulary = read["model"]["vocab"]
    known = vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
    first = max(len(known), *(token["id"] + 1 for token in read["added_tokens"]), 0)
    new = (string for string in strings if string not in known)
    ids = {
        **{string: known[string] for string in strings if string in known},
        **{s: first + i for i, s in enumerate(new)},
    }
    read["added_tokens"] += [{"id": ids[each], "content": each, **flags} for each in strings]
    return read


def gpt2():
    return _bytes(pre.ByteLevel(add_prefix_space=False), special_tokens=["<|endoftext|>"]), None


def qwen():
    read = _bytes(pre.ByteLevel(add_prefix_space=False))
    read["normalizer"] = {"type": "NFC"}
    _add(_add(read, "<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<tool_call>", "<think>", "</think>", special=False)
    return read, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def llama3():
    split = pre.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    read = _bytes(pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)]), ignore_merges=True)
    _add(read, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    return read, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def v4():
    """The released layout: bos, eos and pad at the start, chat tokens, which are not called special, at the end."""
    cuts = [pre.Split(Regex(each), "isolated") for each in (r"\p{N}{1,3}", "[一-龥]+", r"\s?[\p{L}\p{P}\p{S}]+|\s+")]
    first = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    read = _bytes(pre.Sequence([*cuts, level]), special_tokens=first)
    _add(read, *(f"<｜place▁holder▁no▁{i}｜>" for i in range(9)))
    names = ["System", "fim▁hole", "fim▁begin", "fim▁end", "User", "Assistant"]
    _add(read, *(f"<｜{name}｜>" for name in names), "<think>", "</think>", "｜DSML｜", special=False)
    names = [{"__type": "AddedToken", "content": each} for each in first]
    return read, dict(zip(("bos_token", "eos_token", "pad_token"), names))


def _pieces(scheme: Callable[[Tokenizer], None]) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    scheme(tokenizer)
    first = ["<pad>", "<unk>", "<s>", "</s>"]
    read = _trained(
        tokenizer, trainers.BpeTrainer(vocab_size=400, special_tokens=[*first, *FALLBACK], show_progress=False)
    )
    read["added_tokens"] = read["added_tokens"][: len(first)]
    return read


def llama2():
    def scheme(tokenizer):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)

    return _pieces(scheme), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
    def scheme(tokenizer):
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.Replace(" ", "▁"),
            pre.Split(" ", "merged_with_previous"),
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    return _pieces(scheme), None


def _unigram(read_pre: Any, decoder: Any, fallback: bool) -> dict[str, Any]:
    tokenizer, first = Tokenizer(models.Unigram()), ["<pad>", "</s>", "<unk>"]
    tokenizer.pre_tokenizer, tokenizer.decoder = read_pre, decoder
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=first, unk_token="<unk>", show_progress=False)
    read = _trained(tokenizer, trainer)
    signs = [
        [sign, -9.0] for sign in string.printable[:95] if sign not in {piece for piece, _ in read["model"]["vocab"]}
    ]
    read["model"]["vocab"] += signs if not fallback else []
    read["model"]["vocab"][3:3] = [[name, 0.0] for name in FALLBACK] if fallback else []
    read["model"]["byte_fallback"] = fallback
    return read


def mistral():
    space = pre.Metaspace(prepend_scheme="first", split=False)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _unigram(space, decoder, True), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def t5():
    cut = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")])
    read = _unigram(cut, decoders.Metaspace(prepend_scheme="always"), False)
    read["normalizer"] = {"type": "NFKC"}
    return _add(read, "<extra_id_0>"), {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def bert():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    read = _trained(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    vocabulary = read["model"]["vocab"]
    for sign in string.printable[:95]:
        for spelt in (sign, f"##{sign}"):
            vocabulary.setdefault(spelt, len(vocabulary))
    return {**read, "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}, {
        "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"
    }  # fmt: skip


KINDS = {made.__name__: made for made in (gpt2, qwen, llama3, v4, llama2, gemma, mistral, t5, bert)}


def write(folder: Path, read: dict[str, Any], config: dict[str, Any] | None = None, **others: str) -> Path:
    """The folder with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(read, ensure_ascii=False), "utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    for name, text in others.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def foreign(folder: Path, kind: str) -> LibraryTokenizer:
    """The tokenizer of a kind, from files in this folder."""
    tokenizer = load_tokenizer(write(folder, *KINDS[kind]()))
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer


def fit(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    """What a model's configuration says for it."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    return {"vocab_size": tokenizer.vocab_size, **ids}
