"""Continuing prompts: the cache takes the prompt in, in chunks, and then one token of every row at a time.

    logits = prefill(prompt);   repeat:  token = sample(logits),  logits = model(token, cache)

Rows of a batch have their own lengths, random numbers and ends; a row that has ended leaves the batch.
"""

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache import Cache, sent
from ..storage import check_storage
from ..text.constrain import Constraint
from ..text.constrain.walk import Guide
from ..transformer import Transformer
from .graph import TokenGraph, check_graph
from .prefill import prefill
from .sampling import Draws, Sampling
from .speculative import Speculation, speculate

Stops = list[list[int]]


@dataclass
class GenerationStats:
    """What a generation has cost so far, all rows together; up to date after every step."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_tokens: int = 0  # those of `new_tokens` that the prompt's pass gave
    prefill_seconds: float = 0.0  # until the first token is there
    decode_seconds: float = 0.0  # for all others
    cache_bytes: int = 0  # reserved
    speculation: Speculation | None = None
    guide: Guide | None = None

    @property
    def complete(self) -> tuple[bool | None, ...]:
        """Of each row, whether its constraint has been followed to the end: False while it is written, and where a stop
        or `max_new_tokens` cut it off; None for rows without one.
        """
        return () if self.guide is None else self.guide.complete

    @property
    def mask_seconds_per_token(self) -> float:
        """What following constraints takes: finding and applying masks, taking tokens, keeping an end in reach."""
        return 0.0 if self.guide is None else self.guide.seconds / max(self.guide.tokens, 1)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: tokens after the first over the time that they took."""
        return (self.new_tokens - self.first_tokens) / max(self.decode_seconds, 1e-9)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts that were accepted; None without speculation."""
        return None if self.speculation is None else self.speculation.acceptance_rate

    def __str__(self) -> str:
        read, wrote = self.prefill_tokens_per_second, self.tokens_per_second
        parts = [
            f"prompt: {self.prompt_tokens:,} tokens, {self.prefill_seconds:.2f} s to the first new one ({read:,.0f}/s)",
            f"{self.new_tokens:,} new tokens, {self.decode_seconds:.2f} s after the first ({wrote:,.1f}/s)",
            f"cache {self.cache_bytes / 2**20:,.2f} MiB",
        ]
        if self.speculation is not None:
            rate, per_pass = self.speculation.acceptance_rate, self.speculation.tokens_per_pass
            parts.append(f"{rate:.0%} of the drafts accepted, {per_pass:.2f} tokens per pass")
        if self.guide is not None and not self.guide.free:
            parts.append(f"constraint {1e6 * self.mask_seconds_per_token:,.0f} us per token")
        return " · ".join(parts)


class Generation(Iterator[Any]):
    """Tokens as they come: an int at a time, or for a batch a tuple with a token, or None after its end, for every row.

    `stats` tells what they have cost so far.
    """

    def __init__(self, steps: Iterator[tuple[int | None, ...]], batched: bool, stats: GenerationStats) -> None:
        self.stats = stats
        self._steps, self._batched = steps, batched

    def __next__(self) -> Any:
        began, stats = time.perf_counter(), self.stats
        step = next(self._steps)
        seconds, tokens = time.perf_counter() - began, sum(token is not None for token in step)
        if stats.new_tokens == 0:
            stats.prefill_seconds, stats.first_tokens = seconds, tokens
        else:
            stats.decode_seconds += seconds
        stats.new_tokens += tokens
        return step if self._batched else step[0]


def generate(
    model: Transformer,
    prompt: Sequence[int] | Tensor | Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[int | Sequence[int]] | None = None,
    stream: bool = False,
    speculative: bool = False,
    chunk: int | None = None,
    storage: str = "exact",
    cache: Cache | None = None,
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    graph: bool = False,
) -> Generation | list[Any]:
    """The tokens that follow the prompt: a list, or if `stream` an iterator with `stats`; for a batch a list of lists.

    Args:
        prompt: token ids, a sequence or a tensor of one row; or a batch: a list of them, of any lengths.
        max_new_tokens: how many at most, in each row.
        temperature, top_k, top_p, min_p: see `Sampling`; temperature 0 is greedy.
        seed: of the drawing; a row's draws depend on the seed and the row's number only. None draws anew.
        stop: token ids, or sequences of token ids, that end a row once it has written them; they are given too. None =
            the configuration's `eos_token_id`; () = nothing ends a row early.
        stream: give each step as soon as it is known.
        speculative: guess a token ahead with the MTP module, one row only. The same distribution, at temperature 0 the
            same tokens, from fewer passes; other draws for a seed.
        chunk: prompt tokens per pass; None = from a memory budget (see `prefill`).
        storage: of the cache, "exact" or "released" (see `Transformer.new_cache`).
        cache: one row that holds a beginning of the prompt, not all of it: the rest is read, and tokens are appended as
            they are written, the last one excepted; not with `speculative`. None = a new one of that `storage`.
        constraint: what the rows may write, one for all or one (or None) for each; its tokenizer's eos ends a row. The
            mask comes before all of `Sampling`. Unless it says `finish=False`, every row is complete within
            `max_new_tokens` if no stop ends it; a row is complete where eos is its last token (`stats.complete`).
        graph: on a GPU, one CUDA graph for all tokens after the first (`graph.py`): the same tokens, hundreds of
            launches fewer. Rows that have ended stay in the batch. Not with `speculative`, a given `cache`, V3 or V3.2.

    Raises:
        ValueError: an empty prompt, a prompt that with the new tokens is longer than `max_position_embeddings`, a
            sampling setting or a storage that is not allowed, speculation for a batch or without an MTP module, a cache
            that does not fit, constraints of another number or for a larger vocabulary, or one for which no text within
            `max_new_tokens` was found; the argument is named.
        DeadEndError: a constraint allows no next token, and the text is not complete.
        IndexError: a token id outside the vocabulary.
        TypeError: ids that are not integers.
    """
    rows, batched = _rows(model, prompt)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    check_storage(storage)
    stops = _stops(model, stop)
    _check_sizes(model, rows, max_new_tokens, chunk)
    if speculative:
        _check_speculation(model, rows)
    if graph:
        check_graph(model, speculative, cache)
    if cache is not None:
        rows = [_unread(cache, rows, max_new_tokens, speculative)]
    guide = Guide(_constraints(model, constraint, len(rows)), max_new_tokens)
    stats = GenerationStats(sum(map(len, rows)), speculation=Speculation() if speculative else None, guide=guide)
    steps: Iterator[tuple[int | None, ...]] = iter(())
    if max_new_tokens:
        room = max(map(len, rows)) + max_new_tokens
        caches = [cache or model.new_cache(len(rows), room, rewind=int(speculative), storage=storage)]
        draws = Draws(seed, len(rows))
        if stats.speculation is None:
            steps = _decode(model, rows, caches[0], sampling, draws, max_new_tokens, stops, chunk, guide, graph)
        else:
            caches.append(model.new_draft_cache(1, room, storage=storage))
            both = caches[0], caches[1]
            tokens = speculate(
                model, rows[0][None], both, sampling, draws, max_new_tokens, stats.speculation, chunk, guide
            )
            steps = _until_stop(tokens, stops)
        stats.cache_bytes = sum(cache.nbytes() for cache in caches)
    generation = Generation(steps, batched, stats)
    if stream:
        return generation
    written = list(generation)
    if not batched:
        return written
    return [[step[row] for step in written if step[row] is not None] for row in range(len(rows))]


@torch.no_grad()
def _decode(
    model: Transformer,
    rows: list[Tensor],
    cache: Cache,
    sampling: Sampling,
    draws: Draws,
    count: int,
    stops: Stops,
    chunk: int | None,
    guide: Guide,
    graph: bool,
) -> Iterator[tuple[int | None, ...]]:
    """A token of every row at a time; a row that has ended is taken out of the cache, unless a graph needs them all.

    A graph's next pass begins before this one's tokens are looked at, so that it runs meanwhile; the last is in vain.
    """
    lengths = [len(row) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logits = prefill(model, ids, cache, lengths if len(set(lengths)) > 1 else None, chunk=chunk).logits[:, -1]
    repeated = TokenGraph(model, cache) if graph and count > 1 else None
    written: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    for left in range(count, 0, -1):
        mine = logits if len(logits) == len(active) else logits[sent(active, logits.device)]
        drawn = sampling.draw(guide.mask(mine, active), draws.uniform(active, logits.device))
        if not guide.free:
            _check_drawn(drawn.tolist(), active)
        tokens = guide.take(drawn, active)
        if repeated is not None and left > 1:
            everyone = (
                tokens
                if len(tokens) == len(rows)
                else tokens.new_zeros(len(rows)).scatter_(0, sent(active, tokens.device), tokens)
            )
            logits = repeated(everyone.clamp_min(0))[:, -1]
        step: list[int | None] = [None] * len(rows)
        taken = tokens.tolist()
        _check_drawn(taken, active)
        for row, token in zip(active, taken):
            written[row].append(token)
            step[row] = token
        yield tuple(step)
        going = [i for i, row in enumerate(active) if not (_ended(written[row], stops) or guide.ended(row))]
        if left == 1 or not going:
            return
        if len(going) < len(active):
            if repeated is None:
                cache.reorder(going)
            tokens, active = tokens[going], [active[i] for i in going]
        if repeated is None:
            logits = model(tokens[:, None], cache=cache).logits[:, -1]


def _check_drawn(tokens: list[int], rows: list[int]) -> None:
    for row, token in zip(rows, tokens):
        if token < 0:
            raise ValueError(f"the largest logit of row {row} is not finite: finite numbers are needed to sample")


def _until_stop(tokens: Iterator[int], stops: Stops) -> Iterator[tuple[int | None, ...]]:
    written: list[int] = []
    for token in tokens:
        yield (token,)
        written.append(token)
        if _ended(written, stops):
            return


def _ended(written: list[int], stops: Stops) -> bool:
    return any(written[-len(stop) :] == stop for stop in stops)


def _rows(model: Transformer, prompt) -> tuple[list[Tensor], bool]:
    """The prompts as int64 [t] tensors on the model's device, and whether they are a batch."""
    if isinstance(prompt, Tensor):
        if prompt.ndim == 2 and prompt.shape[0] > 1:
            raise ValueError(f"prompt has shape {tuple(prompt.shape)}: one row is allowed; a batch is a list of rows")
        prompt = prompt[0] if prompt.ndim == 2 and len(prompt) else prompt
        return [_ids(model, "prompt", prompt)], False
    if len(prompt) == 0:
        raise ValueError(f"prompt={prompt!r} is empty: at least one token id is needed")
    if not isinstance(prompt, str) and all(_is_row(part) for part in prompt):
        return [_ids(model, f"prompt[{i}]", part) for i, part in enumerate(prompt)], True
    return [_ids(model, "prompt", prompt)], False


def _is_row(part) -> bool:
    """Whether it is no single id."""
    return part.ndim > 0 if isinstance(part, Tensor) else hasattr(part, "__len__")


def _ids(model: Transformer, name: str, values) -> Tensor:
    ids = values if isinstance(values, Tensor) else torch.tensor([_id(name, v) for v in values], dtype=torch.int64)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: a row of at least one token id is needed")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {ids.dtype}: token ids are integers")
    ids = ids.to(model.head.weight.device, torch.int64)
    model._check_range(name, ids)
    return ids


def _id(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} holds {value!r}: token ids are integers") from None


def _stops(model: Transformer, stop) -> Stops:
    """Every stop as a list of token ids; None is the end-of-text token."""
    if stop is None:
        end = model.config.eos_token_id
        return [] if end is None else [[end]]
    if not hasattr(stop, "__len__"):
        raise TypeError(f"stop={stop!r}: a list of token ids, or of sequences of token ids, is needed")
    last = model.config.vocab_size - 1
    stops = [[_id("stop", token) for token in (part if _is_row(part) else [part])] for part in stop]
    for part in stops:
        if not part or min(part) < 0 or max(part) > last:
            raise ValueError(f"stop holds {part}: allowed are token ids 0 to {last}, in a sequence at least one")
    return stops


def _constraints(model: Transformer, constraint, rows: int) -> list[Constraint | None]:
    """One, or None, for each row."""
    every = isinstance(constraint, Constraint) or constraint is None
    found = [constraint] * rows if every else list(constraint)
    if len(found) != rows or not all(each is None or isinstance(each, Constraint) for each in found):
        raise ValueError(
            f"constraint={constraint!r}: allowed is one Constraint, or for each of {rows} rows one or None"
        )
    for each in found:
        if each is not None and each.vocabulary.size > model.config.vocab_size:
            size = each.vocabulary.size
            raise ValueError(f"constraint: its tokenizer has {size} tokens, the model {model.config.vocab_size}")
    return found


def _check_sizes(model: Transformer, rows: list[Tensor], max_new_tokens: int, chunk: int | None) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: allowed are 0 and positive numbers")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: allowed are positive numbers, or None for as many as a memory budget allows")
    tokens, longest = max(map(len, rows)), model.config.max_position_embeddings
    if tokens + max_new_tokens > longest:
        raise ValueError(
            f"a prompt of {tokens} tokens with max_new_tokens={max_new_tokens} may grow to {tokens + max_new_tokens}: "
            f"the configuration allows max_position_embeddings={longest}"
        )


def _unread(cache: Cache, rows: list[Tensor], max_new_tokens: int, speculative: bool) -> Tensor:
    """The part of the prompt that the cache does not hold."""
    if speculative or len(rows) > 1 or cache.batch_size > 1:
        raise ValueError(
            f"cache of batch_size={cache.batch_size} with {len(rows)} prompts and speculative={speculative}: "
            "one row, one prompt and no speculation are allowed"
        )
    past, tokens = int(cache.lengths[0]), len(rows[0])
    if past >= tokens or tokens + max_new_tokens > cache.max_length:
        raise ValueError(
            f"cache holds {past} tokens of max_length={cache.max_length}: the prompt of {tokens} tokens must be longer,"
            f" and fit with max_new_tokens={max_new_tokens}"
        )
    return rows[0][past:]


def _check_speculation(model: Transformer, rows: list[Tensor]) -> None:
    if len(rows) > 1:
        raise ValueError(f"speculative=True with a batch of {len(rows)} prompts: one prompt is allowed")
    if not model.mtp:
        raise ValueError("speculative=True: the model has no MTP module to draft with (num_nextn_predict_layers=0)")
