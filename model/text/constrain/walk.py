"""A grammar followed token by token: what may come next, what came, and one step back for a rejected draft.

b rows · v vocabulary · w words of 32 tokens, a bit each
"""

import re
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from .ending import IN_PARTS, Alphabet, is_way, way_to_the_end
from .grammar import Grammar, expression
from .schema import GrammarError
from .spelling import Spelling


class Tokenizer(Protocol):
    """What a constraint needs to know of a tokenizer: tokens to bytes and back, special strings to ids."""

    vocab_size: int

    @property
    def special(self) -> dict[str, int]: ...
    @property
    def eos(self) -> int: ...
    def token_bytes(self, token: int) -> bytes: ...
    def spell(self, data: bytes) -> list[int]: ...


class DeadEndError(RuntimeError):
    """A text that the grammar allowed so far, but cannot go on with."""


class Constraint:
    """A grammar for one tokenizer, compiled; any number of texts may follow it at once.

    Args:
        grammar: what may be written. The tokenizer's eos ends it, allowed when it is complete and not before.
        tokenizer: a `Tokenizer`.
        finish: see that every text is complete within its budget (see `ending`); otherwise it may be cut off.

    Raises:
        GrammarError: the grammar cannot be compiled, or allows nothing.
        ModuleNotFoundError: llguidance is not installed.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, finish: bool = True) -> None:
        self.grammar, self.finish = grammar, finish
        self.vocabulary = _vocabulary(tokenizer)
        self._start = self.vocabulary.matcher(grammar.lark(tokenizer.special))
        if self._start.is_error():
            raise GrammarError(f"{grammar.source}: {_reason(self._start)}")
        self._start.compute_bitmask()
        if self._start.is_stopped() and not self._start.is_accepting():
            raise GrammarError(f"{grammar.source}: allows no text")
        self._hints = self._texts(grammar.hints)
        self._parts = [part.lark(tokenizer.special) for part in grammar.parts]
        self._way: list[int] | None = None
        self._searched = 0

    def walk(self, budget: int) -> "Walk":
        """The beginning of a text of at most `budget` tokens, eos included.

        Raises:
            GrammarError: with `finish`, no text that is as short was found.
        """
        way = None
        if self.finish:
            way = self._shortest(budget)
        return Walk(self, self.start(), budget, way)

    def start(self) -> Any:
        """llguidance's matcher, with nothing written yet."""
        return self._start.deep_copy()

    def _shortest(self, budget: int) -> list[int]:
        limit = max(budget, LOOKED_FOR)
        if self._way is None and limit > self._searched:
            self._way = self._in_parts(limit) or self.way(self.start(), [self.vocabulary.eos], limit)
            self._searched = limit
        if self._way is None or len(self._way) > budget:
            least = f"up to {limit}" if self._way is None else f"fewer than {len(self._way)}"
            raise GrammarError(
                f"{self.grammar.source}: no text of {least} tokens was found, and max_new_tokens={budget}"
            )
        return self._way

    def _in_parts(self, limit: int) -> list[int] | None:
        """Ways to the end of the grammar's parts, one after the other, where that is a way to its own."""
        way: list[int] = []
        found: dict[str, list[int] | None] = {}
        for part in self._parts:
            if part not in found:
                matcher, eos = self.vocabulary.matcher(part), [self.vocabulary.eos]
                broken = matcher.is_error() or len(found) == PARTS
                given = matcher, self.vocabulary.alphabet, eos, limit - len(way), self._hints, IN_PARTS
                found[part] = None if broken else way_to_the_end(*given)
            text = found[part]
            if text is None:
                return None
            way += text[:-1]
        way = [*self.vocabulary.shorter(way), self.vocabulary.eos]
        return way if len(way) <= limit and is_way(self.start(), way) else None

    def _texts(self, expressions: Sequence[str]) -> list[list[int]]:
        """A short text that matches each expression, where one is found."""
        texts = []
        for each in expressions:
            matcher = self.vocabulary.matcher(f"start: {expression(each)}")
            if not matcher.is_error() and not matcher.is_stopped():
                found = way_to_the_end(matcher, self.vocabulary.alphabet, [self.vocabulary.eos], LONGEST_HINT)
                texts += [] if found is None else [found[:-1]]
        return texts

    def way(self, matcher: Any, known: Sequence[int], limit: int) -> list[int] | None:
        """See `way_to_the_end`; in as few tokens as the tokenizer makes of it."""
        found = way_to_the_end(matcher, self.vocabulary.alphabet, known, limit, self._hints)
        if found is None:
            return None
        shorter = self.vocabulary.shorter(found)
        return shorter if len(shorter) < len(found) and is_way(matcher, shorter) else found


class Walk:
    """One text on its way through a grammar."""

    def __init__(self, constraint: Constraint, matcher: Any, left: int, way: list[int] | None) -> None:
        self.constraint, self.left, self.way = constraint, left, way
        self.complete = False
        self._matcher, self._tail, self._before = matcher, b"", (way, b"")
        self._taken: list[int] = []

    def fill(self, words: np.ndarray, row: int) -> None:
        """Writes the tokens that may come next as row `row` of int32 [b, w].

        Raises:
            DeadEndError: there are none; or too many for the library, which no schema tells beforehand.
        """
        library = _llguidance()
        library.numpy.fill_next_token_bitmask(self._matcher, words, row)
        if not self._matcher.is_accepting() and (self._matcher.is_stopped() or not words[row].any()):
            raise self._dead_end()
        self.constraint.vocabulary.spelling.exclude(self._tail, words[row])

    def take(self, token: int) -> int:
        """Goes on with an allowed token, or, if from there no end is in reach, with the next of the known way.

        Returns the token that is written.
        """
        self._before, known = (self.way, self._tail), self.way
        if known is not None:
            self.way = self._way_after(token, known)
            if self.way is None:
                token, self.way = known[0], known[1:]
        self.left -= 1
        self.complete = token == self.constraint.vocabulary.eos
        self._tail = self.constraint.vocabulary.tail(self._tail, token)
        if not self.complete:
            self._taken.append(token)
            if not self._matcher.consume_token(token):
                raise self._dead_end()
        return token

    def back(self) -> None:
        """Takes the last token back; only one."""
        if not self.complete:  # anew: the library's own way back leaves masks of where it was
            self._matcher, _ = self.constraint.start(), self._taken.pop()
            self._matcher.consume_tokens(self._taken)
        self.left, self.complete = self.left + 1, False
        self.way, self._tail = self._before

    def _dead_end(self) -> DeadEndError:
        return DeadEndError(f"{self.constraint.grammar.source}: cannot go on: {_reason(self._matcher)}")

    def _way_after(self, token: int, known: list[int]) -> list[int] | None:
        """A way from after the token that fits."""
        if token == known[0]:
            return known[1:]
        if token == self.constraint.vocabulary.eos:
            return []
        room = self.left - 1
        for way in self.constraint.vocabulary.alphabet.likely(token, known):
            if len(way) <= room and is_way(self._matcher, [token, *way]):
                return way
        ahead = self._matcher.deep_copy()
        if room <= len(known) or not ahead.consume_token(token):
            return None
        return self.constraint.way(ahead, known, room)


class Guide:
    """The walks of a batch's rows, None for those that are free; counts the time that following them takes."""

    def __init__(self, constraints: Sequence[Constraint | None], budget: int) -> None:
        self.walks = [None if constraint is None else constraint.walk(budget) for constraint in constraints]
        self.tokens, self.seconds = 0, 0.0
        self.free = not any(self.walks)

    def mask(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The logits [b, v] of those rows, -inf for what their grammars do not allow.

        Raises:
            DeadEndError: a row may not go on.
        """
        if self.free:
            return logits
        began = time.perf_counter()
        walks = [self.walks[row] for row in rows]
        size = max((walk.constraint.vocabulary.size for walk in walks if walk is not None), default=0)
        words = np.zeros((len(rows), -(-size // 32)), np.int32)
        for i, walk in enumerate(walks):
            if walk is not None:
                walk.fill(words, i)
        allowed = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=logits.shape[-1])
        allowed[[walk is None for walk in walks]] = 1
        masked = logits.masked_fill(torch.from_numpy(allowed == 0).to(logits.device), -torch.inf)
        self.tokens += sum(walk is not None for walk in walks)
        self.seconds += time.perf_counter() - began
        return masked

    def take(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        """Goes on with a token [b] in each of those rows; returns those that are written."""
        if self.free:
            return tokens
        began = time.perf_counter()
        walks = [self.walks[row] for row in rows]
        written = [token if walk is None else walk.take(token) for walk, token in zip(walks, tokens.tolist())]
        self.seconds += time.perf_counter() - began
        return torch.tensor(written, device=tokens.device)

    def back(self, row: int) -> None:
        """Takes a row's last token back."""
        walk = self.walks[row]
        if walk is not None:
            walk.back()

    def ended(self, row: int) -> bool:
        """Whether a row's text is complete and its end written."""
        walk = self.walks[row]
        return walk is not None and walk.complete

    @property
    def complete(self) -> tuple[bool | None, ...]:
        """`ended` of every row; None for free ones."""
        return tuple(None if walk is None else walk.complete for walk in self.walks)


LOOKED_FOR = 512  # tokens of the shortest text, even if fewer are allowed: to say how many it takes
LONGEST_HINT = 64
PARTS = 100  # of a grammar, those that are alike once: a search for each
ITEMS = 5_000  # of the library's parser at a time: a text that needs more fails


class _Vocabulary:
    """A tokenizer as the library and the search of endings know it. Special tokens get names in angle brackets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos, self.size, self._encode = tokenizer.eos, tokenizer.vocab_size, tokenizer.spell
        special = {token: string for string, token in tokenizer.special.items()}
        pieces = [None if token in special else tokenizer.token_bytes(token) or None for token in range(self.size)]
        names = [special.get(token, f"unused {token}") for token in range(self.size)]
        names = [name if name.startswith("<") and name.endswith(">") else f"<{name}>" for name in names]
        self.pieces = pieces
        self.alphabet = Alphabet(pieces, self.eos)
        self.spelling = Spelling(tokenizer.special, pieces)
        library = _llguidance()
        self.library_tokenizer = library.LLTokenizer(library.TokenizerWrapper(_Source(tokenizer, pieces, names)))

    def matcher(self, lark: str) -> Any:
        """The library's, with nothing written yet."""
        library = _llguidance()
        compiled = library.LLMatcher.grammar_from_lark(lark)
        limits = library.LLParserLimits(max_items_in_row=ITEMS)
        return library.LLMatcher(self.library_tokenizer, compiled, log_level=0, limits=limits)

    def tail(self, text: bytes, token: int) -> bytes:
        """The end of a text after one more token, as much as a special string may begin in."""
        piece = self.pieces[token]
        return b"" if piece is None else (text + piece)[-self.spelling.longest :]

    def shorter(self, tokens: Sequence[int]) -> list[int]:
        """The same bytes and special tokens, as the tokenizer writes them."""
        written, text = [], b""
        for token in tokens:
            piece = self.pieces[token]
            if piece is None:
                written += [*self._encode(text), token]
            text = b"" if piece is None else text + piece
        return [*written, *self._encode(text)]


class _Source:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, pieces: Sequence[bytes | None], names: Sequence[str]) -> None:
        self.eos_token_id, self.encode = tokenizer.eos, tokenizer.spell
        self.tokens = [name.encode() if piece is None else piece for piece, name in zip(pieces, names)]
        self.special_token_ids = [token for token, piece in enumerate(pieces) if piece is None]

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


_vocabularies: WeakKeyDictionary[Any, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: Tokenizer) -> _Vocabulary:
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = _Vocabulary(tokenizer)
    return _vocabularies[tokenizer]


def _reason(matcher: Any) -> str:
    """What the library says, in a line, without the places in our text and its own state."""
    said = re.split(r"\n\s*\d+ \||<state>|<backtrace>", matcher.get_error())[0].replace(
        "panic: assertion failed:", "too large:"
    )
    return said.strip()[:300] or "no token is allowed, and the text is not complete"


def _llguidance() -> ModuleType:
    try:
        import llguidance
        import llguidance.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError("constrained decoding needs llguidance: pip install 'abyssal[serve]'") from None
    return llguidance
