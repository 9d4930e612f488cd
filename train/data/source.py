"""Where batches come from. A source has no state: rows are numbered, and a row is what its number says.

    batch(rows, length, stage)      rows of `length` tokens, numbered from 0 within each stage of the schedule

So a checkpoint need not hold a position in the data, gradient accumulation takes parts of a step's rows, and several
processes take a share each. Text repeats in epochs, each in a new order; planted tasks never repeat.

Four kinds: text (`TextSource`), conversations of one's own, planted dependencies, generated problems.
"""

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..settings import DataConfig
from .bits import target_bits
from .corpus import Corpus
from .mapped import Tokenised, tokenised, trained_tokenizer
from .opponents import n_grams, training_text
from .overlap import WINDOW, copied_of, searched
from .rows import Batch, held_out, train_rows
from .scored import Scored
from .tokenizers import ByteTokenizer, Tokenizer, bpe_size, load_tokenizer


class Source(Protocol):
    """What training asks of its data."""

    vocabulary: int  # token ids are below this
    digest: str  # two sources of the same digest and recipe give the same batches

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What its tokens spell; None where they spell no text."""

    def describe(self) -> str:
        """One line about the data."""

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        """The rows of these numbers, on the host."""

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Scores of the model on data that is never trained on, for the metrics; names are the source's own."""

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        """What `evaluate` found as lines for people: label and text, the score that counts first."""


class TextSource:
    """Documents in packed rows; scored by bits per byte of held-out documents, beside a trigram model's.

    Bytes are laid out in memory; tokens of a trained tokenizer, and bytes with data.mapped, stay in a file.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, seed: int) -> None:
        self.corpus, self.tokenizer, self.seed, self.batch_size = corpus, tokenizer, seed, data.batch_size
        self.vocabulary = tokenizer.least
        in_bytes = isinstance(self.tokenizer, ByteTokenizer)
        self.maps = maps(data)
        self.tokens = tokenised(corpus, self.tokenizer) if self.maps else corpus
        self.held_out = held_out(self.tokens, data.sequence_length, data.held_out_rows)
        self.sizes = None if in_bytes else self._sizes()
        self.name = data.source
        self.digest = corpus.digest if in_bytes else f"{corpus.digest} {self.tokenizer.digest}"

    @cached_property
    def scored(self) -> Scored:
        return Scored(self.corpus.held_out, self.held_out, self.sizes)

    @cached_property
    def trigram(self) -> float:
        return float(n_grams(training_text(self.corpus.train), self.scored, [3])[3].mean())

    @cached_property
    def clean(self) -> np.ndarray:
        """Bool [held-out targets]: no byte of it lies in a match of WINDOW bytes or more with a training document."""
        return self.scored.without(copied_of(self.corpus, self.scored.numbers, self.maps))

    def held_out_bytes(self) -> int:
        """Bytes that the held-out targets are made of."""
        return self.scored.bytes

    @property
    def bytes_per_token(self) -> float:
        """Of the training text, bos not counted."""
        if self.sizes is None or not isinstance(self.tokens, Tokenised):
            return 1.0
        tokens = self.tokens.train
        return sum(document.size for document in self.corpus.train) / (len(tokens.tokens) - len(tokens))

    def describe(self) -> str:
        count = sum(map(bool, self.tokenizer.pieces))
        spelt = "" if self.sizes is None else f"; {count:,} tokens of {self.tokenizer.name}"
        return f"corpus {self.name}: {self.corpus}{spelt}"

    def _sizes(self) -> np.ndarray:
        """Bytes of each token of the held-out stream."""
        if isinstance(self.tokens, Tokenised) and self.tokens.held_out.sizes is not None:
            return self.tokens.held_out.sizes
        table = np.array([*map(len, self.tokenizer.pieces), 0])
        return table[np.minimum(self.held_out.stream.tokens, len(table) - 1)]

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        return train_rows(self.tokens, length, self.seed, rows, stage)

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        bits = target_bits(model, self.held_out.batches(self.batch_size), dtype)
        scores = {"held_out": bits.sum() / self.scored.bytes, "trigram": self.trigram}
        if self.clean_bytes():
            scores["clean"] = bits[self.clean].sum() / self.clean_bytes()
        return {name: float(score) for name, score in scores.items()}

    def clean_bytes(self) -> int:
        """Held-out bytes that no match with training text holds."""
        return int(self.scored.widths[self.clean].sum())

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        gap = scores["trigram"] - scores["held_out"]
        compared = f"the model is {abs(gap):.4f} {'better' if gap > 0 else 'worse'}"
        return {
            "held-out bits per byte": f"{scores['held_out']:.4f}",
            "trigram, same bytes": f"{scores['trigram']:.4f}   ({compared})",
            "on clean bytes alone": f"{scores['clean']:.4f}   ({self._cleanness})"
            if "clean" in scores
            else "no byte is",
        }

    @cached_property
    def _cleanness(self) -> str:
        share = self.clean_bytes() / self.scored.bytes
        return f"{share:.1%} of all, in no match of {WINDOW} bytes with {searched(self.corpus.train)}"


def maps(data: DataConfig) -> bool:
    """Whether the tokens of a text lie in a file that is mapped into memory."""
    return data.mapped or data.tokenizer != ByteTokenizer.name


def open_tokenizer(name: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer that data.tokenizer means; `bpe:N` is trained on the corpus once, and then found in the cache."""
    size = bpe_size(name)
    return load_tokenizer(name) if size is None else trained_tokenizer(corpus, size)
