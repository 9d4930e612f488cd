"""The two files of a tokenizer, as Hugging Face's libraries read them, and the characters that spell bytes in them."""

import json
from typing import TYPE_CHECKING, Any

from .special import BOS, EOS, PAD, special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
BYTES = 256


def _spelling() -> list[str]:
    """The character by which the library's files spell each byte: itself if it prints, else one above 255."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(BYTES)]


SPELLING = _spelling()
BYTE_OF = {character: byte for byte, character in enumerate(SPELLING)}


def config() -> str:
    """tokenizer_config.json: which of our special tokens open, end and pad."""
    contents = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(contents, ensure_ascii=False, indent=1) + "\n"


def written(vocabulary: dict[str, int], merges: list[Any], words: bool) -> str:
    """tokenizer.json: bytes and merges, our special tokens behind them, and bos before a text that is to have it.

    `words`: the text is cut into words (the regular expression of GPT-2), across which nothing is merged.
    """
    special = special_ids(len(vocabulary))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}
    first = {"SpecialToken": {"id": BOS, "type_id": 0}}
    texts = [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"]
    read = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [{"id": token, "content": string, **flags} for string, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, texts[0]],
            "pair": [first, *texts],
            "special_tokens": {BOS: {"id": BOS, "ids": [special[BOS]], "tokens": [BOS]}},
        },
        "decoder": {**level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(read, ensure_ascii=False, indent=2)


def library() -> "type[Library]":
    """The class of the library, where it is installed."""
    try:
        from tokenizers import Tokenizer as Library
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "trained tokenizers need the tokenizers library: pip install 'abyssal[text]'", name="tokenizers"
        ) from None
    return Library
