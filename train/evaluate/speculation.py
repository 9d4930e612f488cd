"""Speculative against plain decoding of a trained model: the same tokens, how many drafts are accepted, what it costs.

Both write greedily from the start of the same held-out document. On a CPU a pass over two tokens costs almost twice as
much as one over one token, so that speculation has little to win there; on a GPU it costs about the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...model import Transformer, generate
from ...model.generation.generate import Generation, GenerationStats
from ..data.corpus import load_corpus


@dataclass(frozen=True)
class Comparison:
    """What both wrote after some prompts; `differs` is the first (prompt, token) at which they disagree, or None."""

    tokens: int
    differs: tuple[int, int] | None
    plain: list[GenerationStats]
    speculative: list[GenerationStats]

    @property
    def acceptance_rate(self) -> float:
        drafts = [stats.speculation for stats in self.speculative if stats.speculation is not None]
        return sum(d.accepted for d in drafts) / max(sum(d.drafted for d in drafts), 1)

    @property
    def speed_up(self) -> float:
        return _speed(self.speculative) / _speed(self.plain)

    def __str__(self) -> str:
        where = "" if self.differs is None else " after prompt {} from token {} on".format(*self.differs)
        lines = [
            f"tokens       {self.tokens:,} of each, " + (f"different{where}" if where else "the same"),
            f"accepted     {self.acceptance_rate:.1%} of the drafts",
            f"plain        {_speed(self.plain):,.1f} tokens/s",
            f"speculative  {_speed(self.speculative):,.1f} tokens/s: {self.speed_up:.2f} times as fast",
        ]
        return "\n".join(lines)


def compare(model: Transformer, prompts: Sequence[Sequence[int]], tokens: int) -> Comparison:
    """Writes `tokens` tokens after each prompt, greedily, in both ways.

    Raises:
        ValueError: no prompts, a model without MTP module, or more tokens than its `max_position_embeddings`.
    """
    if not prompts:
        raise ValueError("prompts is empty: at least one is needed")
    options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 0.0, "stop": (), "stream": True}
    differs, count = None, 0
    plain, speculative = [], []
    for number, prompt in enumerate(prompts):
        streams = [cast(Generation, generate(model, prompt, speculative=s, **options)) for s in (False, True)]
        one, other = (list(stream) for stream in streams)
        if differs is None and one != other:
            shorter = min(len(one), len(other))
            differs = number, next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), shorter)
        plain.append(streams[0].stats)
        speculative.append(streams[1].stats)
        count += len(one)
    return Comparison(count, differs, plain, speculative)


def run(checkpoint: Path, prompts: int, tokens: int, prompt_bytes: int) -> Comparison:
    """Compares on a trained model, which goes on from the first bytes of held-out documents of its corpus.

    Raises:
        ValueError: a number that is not positive, or more prompts than there are held-out documents.
    """
    from ..run.load import open_model

    for name, value in (("prompts", prompts), ("tokens", tokens), ("prompt_bytes", prompt_bytes)):
        if value < 1:
            raise ValueError(f"{name}={value}: allowed are positive numbers")
    loaded = open_model(checkpoint)
    tokenizer, data = loaded.spelling(), loaded.learning().data
    documents = load_corpus(data.source, data.held_out_fraction, text_key=data.text_key).held_out
    if prompts > len(documents):
        raise ValueError(f"prompts={prompts}: the corpus has {len(documents)} held-out documents")
    texts = [tokenizer.encode_bytes(document.text[:prompt_bytes]) for document in documents[:prompts]]
    return compare(loaded.model, [[tokenizer.bos, *text] for text in texts], tokens)


def _speed(stats: Sequence[GenerationStats]) -> float:
    """Tokens after the first of each, per second."""
    return sum(s.new_tokens - s.first_tokens for s in stats) / max(sum(s.decode_seconds for s in stats), 1e-9)
