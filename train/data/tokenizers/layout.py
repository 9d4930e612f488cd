"""What a tokenizer.json of the `tokenizers` library says: which tokens there are, and what each of them stands for.

kind     by its decoder      a token that is spelt x stands for                                         as in
bytes    ByteLevel           a byte for each character, in GPT-2's alphabet (added tokens: their text)   GPT-2, Llama 3
blanks   Metaspace, Replace  x with blanks for ▁; <0x0A> for that byte, where the model falls back       Llama 2, T5
words    WordPiece, none     a blank and x; ##x for x                                                    BERT
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .files import BYTE_OF, SPELLING

Read = Mapping[str, Any]  # parsed
KNOWN = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip", "WordPiece"}
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
UNKNOWN = "\ufffd"  # what a character that the vocabulary lacks becomes


class Lead(NamedTuple):
    """What encoding puts before a text, whether behind each special token too, and whether it can be told not to."""

    text: bytes = b""
    again: bool = False
    optional: bool = False


def string_of(token: Any) -> str:
    """The string of a token that is given by it or by a table."""
    return token["content"] if isinstance(token, dict) else token


def model_tokens(read: Read) -> dict[str, int]:
    """The tokens of the model's own vocabulary."""
    vocabulary = read["model"]["vocab"]
    pairs = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((piece, i) for i, (piece, _) in enumerate(vocabulary))
    )
    return dict(pairs)


def added_tokens(read: Read, config: Read) -> dict[str, dict[str, Any]]:
    """Those that were added to it, by tokenizer.json or else by tokenizer_config.json, with what is said of them."""
    others = [{**entry, "id": int(token)} for token, entry in (config.get("added_tokens_decoder") or {}).items()]
    return {entry["content"]: entry for entry in (*others, *(read.get("added_tokens") or ()))}


def unknown_token(read: Read) -> str | None:
    """The token of what the vocabulary lacks."""
    model = read["model"]
    return model.get("unk_token") if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]


def kind(read: Read) -> str:
    """See above. Raises ValueError for a decoder that does more to its tokens than these."""
    decoders = {part["type"] for part in _parts(read.get("decoder"))}
    others = {part["type"] for part in _parts(read.get("pre_tokenizer"))}
    if not decoders <= KNOWN:
        raise ValueError(f"decoder {min(decoders - KNOWN)}: allowed are {', '.join(sorted(KNOWN))}, and none")
    if "ByteLevel" in (decoders or others):
        return "bytes"
    return "blanks" if "WordPiece" not in decoders and (decoders or "Metaspace" in others) else "words"


def byte_tokens(read: Read, ids: Mapping[str, int]) -> list[int]:
    """The token of each byte; none where not every byte has one."""
    names = {"bytes": SPELLING, "blanks": FALLBACK if _falls_back(read) else [], "words": []}[kind(read)]
    return [ids[name] for name in names] if all(name in ids for name in names) else []


def pieces(read: Read, ids: Mapping[str, int], added: Iterable[str], special: Mapping[str, int]) -> tuple[bytes, ...]:
    """What each id stands for: nothing for special ones, U+FFFD for that of what the vocabulary lacks."""
    reads, unknown = _reader(read), unknown_token(read)
    found = [b""] * (max(ids.values()) + 1)
    for string, token in ids.items():
        if string == unknown:
            found[token] = (b" " if kind(read) == "words" else b"") + UNKNOWN.encode()
        elif string not in special:
            found[token] = string.encode() if string in added and kind(read) == "bytes" else reads(string)
    return tuple(found)


def lead(read: Read) -> Lead:
    """What the normaliser and the pre-tokenizer put before a text."""
    if kind(read) == "words":
        return Lead(b" ", again=True)
    if any(part["type"] == "Prepend" for part in _parts(read.get("normalizer"))):
        return Lead(b" ", again=True, optional=True)
    for number, part in enumerate(_parts(read.get("pre_tokenizer"))):
        if part["type"] in ("Metaspace", "ByteLevel") and _prepends(part):
            first = part.get("prepend_scheme") == "first"
            return Lead(b" ", not first, first or not number)  # behind one that cuts, it leads every word
    return Lead()


def without_lead(component: Any) -> Any:
    """A normaliser or a pre-tokenizer that puts nothing before a text."""
    if component is None or component["type"] == "Prepend":
        return None
    if component["type"] == "Sequence":
        ((name, parts),) = ((key, value) for key, value in component.items() if key != "type")
        return {"type": "Sequence", name: [part for part in map(without_lead, parts) if part is not None]}
    if component["type"] == "Metaspace":
        return {**{k: v for k, v in component.items() if k != "add_prefix_space"}, "prepend_scheme": "never"}
    return {**component, "add_prefix_space": False} if component["type"] == "ByteLevel" else component


def hide(model: dict[str, Any], strings: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The model with names that no text spells for those of these tokens that it would find in one, and the names.

    A model of merges finds only what they make, unless it looks for whole words first.
    """
    if "merges" in model and not model.get("ignore_merges"):
        return model, {}
    made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", ())}
    vocabulary = model["vocab"]
    held = vocabulary if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    names = {string: f"\0{string}\0" for string in strings if string in held and string not in made}
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(piece, piece): token for piece, token in vocabulary.items()}
    else:
        renamed = [[names.get(piece, piece), score] for piece, score in vocabulary]
    unknown = {"unk_token": names.get(model["unk_token"], model["unk_token"])} if model.get("unk_token") else {}
    return {**model, **unknown, "vocab": renamed}, names


def _parts(component: Any) -> Iterator[Read]:
    """The parts of a normaliser, pre-tokenizer or decoder, in order."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for key, parts in component.items():
        if key != "type":
            for part in parts:
                yield from _parts(part)


def _prepends(part: Read) -> bool:
    return bool(part.get("add_prefix_space", True)) and part.get("prepend_scheme") != "never"


def _falls_back(read: Read) -> bool:
    return bool(read["model"].get("byte_fallback"))


def _reader(read: Read) -> Callable[[str], bytes]:
    """From a token's spelling to what it stands for."""
    how, decoders = kind(read), [*_parts(read.get("decoder"))]
    if how == "bytes":
        return lambda spelt: bytes(map(BYTE_OF.__getitem__, spelt)) if BYTE_OF.keys() >= {*spelt} else spelt.encode()
    if how == "words":
        prefixes = [part["prefix"] for part in decoders]
        inner = (prefixes or [read["model"].get("continuing_subword_prefix")])[0]
        return lambda spelt: (spelt.removeprefix(inner) if inner and spelt.startswith(inner) else f" {spelt}").encode()
    spaces = [part for part in (*decoders, *_parts(read.get("pre_tokenizer"))) if part["type"] == "Metaspace"]
    swaps = [(part["replacement"], " ") for part in spaces]
    swaps += [(part["pattern"]["String"], part["content"]) for part in decoders if part["type"] == "Replace"]
    byte = dict(zip(FALLBACK, (bytes([value]) for value in range(256)))) if _falls_back(read) else {}

    def reads(spelt: str) -> bytes:
        if spelt in byte:
            return byte[spelt]
        for old, new in swaps:
            spelt = spelt.replace(old, new)
        return spelt.encode()

    return reads
