"""Where batches come from. A source has no state: rows are numbered, and a row is what its number says.

    batch(rows, length, stage)      rows of `length` tokens, numbered from 0 within each stage of the schedule

So a checkpoint need not hold a position in the data, gradient accumulation takes parts of a step's rows, and several
processes take a share each. Text repeats in epochs, each in a new order; planted tasks never repeat.

Three kinds: text (`TextSource`), planted dependencies, conversations.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .corpus import Corpus, load_corpus
from .data import Batch, held_out, train_rows
from .evaluate import bits_per_byte, trigram_bits_per_byte
from .tokenizers import ByteTokenizer, Tokenizer
from .tokens import VOCABULARY

if TYPE_CHECKING:
    from .recipe import Recipe


class Source(Protocol):
    """What training asks of its data."""

    vocabulary: int  # token ids are below this
    tokenizer: Tokenizer | None  # what its tokens spell; None where they spell no text
    digest: str  # two sources of the same digest and recipe give the same batches

    def describe(self) -> str:
        """One line about the data."""

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        """The rows of these numbers, on the host."""

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Scores of the model on data that is never trained on, for the metrics; names are the source's own."""

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        """What `evaluate` found as lines for people: label and text, the score that counts first."""


class TextSource:
    """Documents in packed rows; scored by bits per byte of held-out documents, beside a trigram model's."""

    vocabulary = VOCABULARY
    tokenizer = ByteTokenizer()

    def __init__(self, corpus: Corpus, recipe: "Recipe") -> None:
        self.corpus, self.seed, self.batch_size = corpus, recipe.train.seed, recipe.data.batch_size
        self.held_out = held_out(corpus, recipe.data.sequence_length, recipe.data.held_out_rows)
        self.name, self.digest = recipe.data.source, corpus.digest

    @cached_property
    def trigram(self) -> float:
        return trigram_bits_per_byte(self.corpus, self.held_out)

    def describe(self) -> str:
        return f"corpus {self.name}: {self.corpus}"

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        return train_rows(self.corpus, length, self.seed, rows, stage)

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "held_out": bits_per_byte(model, self.held_out, self.batch_size, dtype),
            "trigram": self.trigram,
        }

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        gap = scores["trigram"] - scores["held_out"]
        compared = f"the model is {abs(gap):.4f} {'better' if gap > 0 else 'worse'}"
        return {
            "held-out bits per byte": f"{scores['held_out']:.4f}",
            "trigram, same bytes": f"{scores['trigram']:.4f}   ({compared})",
        }


def open_source(recipe: "Recipe") -> Source:
    """The source that a recipe names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its tokens do not fit into the model's vocabulary.
    """
    if recipe.reason is not None:
        from .reason.source import ReasonSource

        return ReasonSource(recipe)
    if recipe.data.source.startswith("planted:"):
        from .planted.source import open_planted

        return open_planted(recipe)
    return TextSource(load_corpus(recipe.data.source, recipe.data.held_out_fraction), recipe)
