"""Ways to the end: tokens after which a text is complete, so that every answer ends within its budget.

    left(s . t) >= |way(s . t)|        holds for every token t that is written, from the start on

A token is written only if after it a way to the end is known that fits into the tokens left; otherwise the first token
of the way known before takes its place. By induction there is always one: after way[0] the rest way[1:] is valid and
one shorter. A model that closes what it opens never notices; one that does not writes on until the last moment, and
then only what closes. Which way is found depends on the text and the budget alone, not on what might have been drawn.

Finding one: the way known before often still fits, whole or its last part (within a string any letter leaves it as it
is). Otherwise a search breadth first over single bytes joins it again. Texts count as one if in the last two steps they
took bytes of a kind and were allowed the same next; what was not allowed before comes first. Where anything may be
written on the way to a pattern, texts that match it are tried (hints). Where a run of tokens is forced that was not met
before (a property's name, a tag), the search goes on from there alone, or if that fails without such landmarks. Not
finding any way means that a token is not written, never that an answer is wrong.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

# one search after the other: texts side by side, steps at most (to the next landmark), whether landmarks are kept to
SEARCHES = ((2, 500, False), (16, 2000, True), (64, 6000, True), (64, 8000, False))
IN_PARTS = ((2, 2000, False), (16, 2000, True))  # many, each for what is short
FAR, AROUND = (1, 40000, False), 8  # where nothing else is found, for what counts to hundreds; times the limit's length
LONGER = 128  # tokens than the known way that a way may be without a look for a shorter one
STEPS_PER_TOKEN = 64  # steps at most for each token that is left beyond the known way
WIDE = 64  # such searches try all letters
FEW = 16  # choices; of more some are left out
REST = {**dict.fromkeys(range(0xC2, 0xE0), "80"), 0xE0: "a080", 0xF0: "908080"}  # of a character, after its first byte
REST |= {**dict.fromkeys(range(0xE1, 0xF0), "8080"), **dict.fromkeys(range(0xF1, 0xF5), "808080")}
CLOSING = '</"}],:'  # signs that are tried first


_Text = tuple[list[int], Any]  # tokens, and a matcher that has taken them


class Alphabet:
    """The tokens that searches write: of each byte one, and the special tokens.

    Args:
        pieces: each token's bytes; None for special tokens.
        eos: the end; searches write it as the last token of `known` only.
    """

    def __init__(self, pieces: Sequence[bytes | None], eos: int) -> None:
        self.eos = eos
        self.byte = np.full(len(pieces), -1)
        seen = set()
        for token, piece in enumerate(pieces):
            if piece is None:
                self.byte[token] = 256
            elif len(piece) == 1 and piece not in seen:
                self.byte[token] = piece[0]
                seen.add(piece)
        one = {byte: token for token, byte in enumerate(self.byte.tolist())}
        self.rest = {first: [one.get(byte, eos) for byte in bytes.fromhex(rest)] for first, rest in REST.items()}

    def likely(self, token: int, known: list[int]) -> list[list[int]]:
        """Ways after a token that are worth a try: the known one, without its start, or after the rest of a character.

        After the first byte of a character comes the smallest rest that UTF-8 allows.
        """
        rest = self.rest.get(int(self.byte[token]))
        return [known[start:] for start in range(min(4, len(known)))] if rest is None else [[*rest, *known]]

    def choices(self, mask: bytes, everything: bool) -> list[int]:
        """Of the tokens that a mask allows those worth trying: special ones, signs, and few of many letters."""
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little", count=len(self.byte)).nonzero()[0]
        allowed = allowed[allowed != self.eos]
        byte = self.byte[allowed]
        plain, special = allowed[(byte >= 0) & (byte < 128)], allowed[byte == 256]
        if len(plain) > FEW and not everything:
            plain = np.array([token for token in plain if self._is_worth(chr(self.byte[token]))])
        if not len(plain):
            plain = allowed[(byte >= 128) & (byte < 256)][:2]
        chosen = [*sorted(plain.tolist(), key=self._turn), *special.tolist()]
        return chosen or allowed[:2].tolist()  # tokens of several bytes, where the library forces their way

    def kind(self, token: int) -> str:
        """Letter, digit, or which sign a token is."""
        character = chr(max(self.byte[token], 0))
        return "letter" if character.isalpha() else "digit" if character.isdigit() else character

    def _turn(self, token: int) -> int:
        return CLOSING.find(chr(self.byte[token])) % 256

    @staticmethod
    def _is_worth(character: str) -> bool:
        return character in "01aA" or (character.isprintable() and not character.isalnum()) or character == "\n"


def way_to_the_end(
    matcher: Any,
    alphabet: Alphabet,
    known: Sequence[int],
    limit: int,
    hints: Sequence[list[int]] = (),
    searches: Sequence[tuple[int, int, bool]] = (*SEARCHES, FAR),
) -> list[int] | None:
    """Tokens, at most `limit`, that complete the matcher's text, the last of them eos; None if none was found.

    Args:
        matcher: llguidance's; it is not moved: once it was put back, its masks would not always be right.
        known: a way that was valid before the last token, or [eos].
        hints: texts to try where much is allowed, or their ends.
        searches: what is tried, one after the other.
    """
    best: list[int] | None = None
    for search in searches:
        if search is FAR and (best is not None or len(known) > 1):
            break
        width, steps, landmarks = search
        steps = min(steps, STEPS_PER_TOKEN * (limit - len(known)))
        reach = AROUND * limit if search is FAR else limit
        found = _search(matcher, alphabet, list(known), reach, hints, width, steps, landmarks)
        found = found and _shortened(matcher, found)
        if found and len(found) <= limit:
            best = found if best is None or len(found) < len(best) else best
            if len(best) <= len(known) + LONGER:
                break
    return best


def is_way(matcher: Any, tokens: Sequence[int]) -> bool:
    """Whether the text may go on with all of these tokens, the last of them eos."""
    if len(tokens) == 1:  # the library validates no eos where nothing else could come
        return matcher.is_accepting()
    return matcher.validate_tokens(tokens) == len(tokens)


def _search(
    matcher: Any,
    alphabet: Alphabet,
    known: list[int],
    limit: int,
    hints: Sequence[list[int]],
    width: int,
    steps: int,
    landmarks: bool,
) -> list[int] | None:
    everything, left = width >= WIDE, steps
    seen: Counter[bytes] = Counter()
    met: set[tuple[int, ...]] = set()
    level: dict[Any, _Text] = {("", ""): ([], matcher)}  # by what was allowed and taken in the last two steps
    while level and left > 0:
        after: dict[Any, _Text] = {}
        before: set[bytes] = set()
        landmark: tuple[tuple[int, ...], Any] | None = None
        for (_, last), (path, matcher) in level.items():
            rest = _joined(matcher, known, limit - len(path))
            if rest is not None:
                return path + rest
            if len(path) >= limit:
                continue
            before.add(matcher.compute_bitmask())
            for more, kind in _next(matcher, alphabet, hints, everything):
                if last and kind == last[1] and isinstance(kind, tuple):
                    continue  # a hint twice leads nowhere
                left -= 1
                further = matcher.deep_copy()
                further.consume_tokens(more)
                key = last, (further.compute_bitmask(), kind)
                after.setdefault(key, ([*path, *more], further))
                run = tuple(more[-8:])  # the end of what is forced tells where it leads
                if landmark is None and kind == "forced" and len(run) > 1 and run not in met:
                    landmark = run, key
        if landmarks and landmark is not None:
            met.add(landmark[0])
            level, left = {landmark[1]: after[landmark[1]]}, steps
            seen.clear()
            continue
        masks = {key: key[1][0] for key in after}
        seen.update(before)
        # alone, letters come first: an escaped one is shortened to itself
        new_first = sorted(
            after, key=lambda key: (seen[masks[key]], _size(masks[key]), width == 1 and key[1][1] != "letter")
        )
        level = {key: after[key] for key in new_first[:width]}
    return None


def _next(
    matcher: Any, alphabet: Alphabet, hints: Sequence[list[int]], everything: bool
) -> list[tuple[list[int], Any]]:
    """What may come next, and of what kind it is: all that is forced, else a token, or (the end of) a hint."""
    forced = matcher.compute_ff_tokens()
    if forced:
        return [(forced, "forced")]
    mask = matcher.compute_bitmask()
    tokens = alphabet.choices(mask, everything)
    choices = [([token], token if everything else alphabet.kind(token)) for token in tokens]
    if _size(mask) <= FEW:
        return choices
    ends = [(start, hint[start:]) for hint in hints for start in range(len(hint))]
    valid = [end for _, end in sorted(ends) if matcher.validate_tokens(end) == len(end)]
    return [(end, tuple(end)) for end in valid] + choices


def _size(mask: bytes) -> int:
    return int.from_bytes(mask, "little").bit_count()


def _shortened(matcher: Any, way: list[int]) -> list[int]:
    """The way without runs of tokens that it is a way without."""
    for run in (6, 1):
        start = 0
        while start + run < len(way):
            rest = way[:start] + way[start + run :]
            way, start = (rest, start) if is_way(matcher, rest) else (way, start + 1)
    return way


def _joined(matcher: Any, known: list[int], limit: int) -> list[int] | None:
    """The shortest part of the known way, up to its end, that is valid here, if it is no longer than that."""
    for length in range(1, min(limit, len(known)) + 1):
        if is_way(matcher, known[-length:]):
            return known[-length:]
    return None
