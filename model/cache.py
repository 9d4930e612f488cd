"""What a model remembers of the tokens that it has seen (V4 3.6; spec B.7, D.3).

Per layer: the keys of the last `window` - 1 tokens; the compressed entries and index keys so far; the projections
(k, z) of the tokens whose window is not complete; for Engram the last N - 1 token ids and the rows in reach of the
convolution. Everything but the entries is a *tail*: the last few rows of a sequence that grows. Nothing else depends on
the number of tokens seen.

Storage. Window keys, entries and index keys are held in the model's dtype ("exact"), or in the released number formats
("released"; `storage`). Everything else is the same: rows are then bytes.

Rewinding. Tails keep `rewind` rows more than the next token needs, entries past the length are simply not seen, so that
the cache can be cut back by up to `rewind` tokens, exactly.

Repeating. A pass whose numbers are all on the device (`FixedStep`: one new token in every row) can be a CUDA graph
(`generation/graph.py`): tails are then full and roll, entries are written where the device says.

Interruptions. What a length counts is never written over: tails are written past their end or into a new buffer,
entries past the length. Putting the old buffers and lengths back therefore undoes a call that did not come to its end.

b batch rows · t new tokens · k rows kept · p entries
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .kinds import SPARSE
from .layout import Entries, Layout
from .storage import Coded, CodedStep, Format, formats

SLACK = 32  # rows that a tail can grow before it moves to a new buffer


class Undo(Exception):
    """Ends a block of `Cache.appending` whose tokens are to be forgotten."""


@dataclass(frozen=True)
class Step:
    """One call's tokens: how many each row had before, and how many of the new columns are real in each row."""

    past: list[int]
    new: list[int]
    columns: int

    @property
    def even(self) -> bool:
        """All rows have the same past and all columns are real: rows need no bookkeeping of their own."""
        return len(set(self.past)) == 1 and set(self.new) == {self.columns}

    def kept(self, keep: int) -> int:
        """How many past rows a tail that needs `keep` of them puts before the new ones."""
        return min(keep, max(self.past))


@dataclass(frozen=True)
class FixedStep:
    """One new token in every row, of a cache that is `fixed`; where it stands, only the device knows."""

    past: Tensor  # int64 [b, 1]

    def kept(self, keep: int) -> int:
        """As of `Step`: every tail is full."""
        return keep


class Tail:
    """The last rows of a growing sequence, per batch row, the newest of all rows in the same column.

    A buffer [b, keep + rewind + SLACK, ...] is filled from the left; when it is full, a new one begins with the rows
    that are still needed. Appending one row copies one row, and the rows that are needed are a view.
    """

    def __init__(self, batch: int, keep: int, rewind: int, shape: Sequence[int], like: Tensor) -> None:
        self.keep, self.hold = keep, keep + rewind
        self.rows = like.new_zeros(batch, self.hold + SLACK, *shape)
        self.end = 0

    def extend(self, new: Tensor, step: Step | FixedStep) -> Tensor:
        """Appends the real columns of new [b, t, ...]; returns [b, kept + t, ...], the past in need and all of new."""
        if isinstance(step, FixedStep):
            return self._roll(new)
        kept, t = step.kept(self.keep), new.shape[1]
        if step.even and self.end + t <= self.rows.shape[1]:
            self.rows[:, self.end : self.end + t] = new
            self.end += t
            return self.rows[:, self.end - t - kept : self.end]
        old = min(self.hold, self.end)
        both = torch.cat([self.rows[:, self.end - old : self.end], new.to(self.rows.dtype)], 1)
        self._store(both, [old + n for n in step.new])
        return both[:, old - kept :]

    def fix(self) -> None:
        """Full from here on, the newest row at its end; rows that were never written are zeros that nobody sees."""
        rows, have = torch.zeros_like(self.rows), min(self.hold, self.end)
        rows[:, self.hold - have : self.hold] = self.rows[:, self.end - have : self.end]
        self.rows, self.end = rows, self.hold

    def _roll(self, new: Tensor) -> Tensor:
        both = torch.cat([self.rows[:, : self.hold], new.to(self.rows.dtype)], 1)
        self.rows[:, : self.hold] = both[:, 1:]
        return both[:, self.hold - self.keep :]

    def push(self, row: np.ndarray, past: int) -> np.ndarray:
        """Appends a row to a single sequence of `past` rows; returns [kept + 1, ...], the past in need and the row."""
        if self.end == self.rows.shape[1]:
            self._store(self.rows, [self.end])
        rows = self.rows.numpy()[0]
        rows[self.end] = row
        self.end += 1
        return rows[self.end - 1 - min(self.keep, past) : self.end]

    def drop(self, counts: Sequence[int]) -> None:
        """Forgets the last counts[b] rows of each batch row."""
        if len(set(counts)) == 1:
            self.end -= counts[0]
        elif any(counts):
            self._store(self.rows[:, : self.end], [self.end - n for n in counts])

    def _store(self, source: Tensor, ends: Sequence[int]) -> None:
        """A new buffer with the last rows of source[b, :ends[b]], newest in the same column."""
        self.rows, self.end = torch.zeros_like(self.rows), min(self.hold, max(ends))
        if len(set(ends)) == 1:
            self.rows[:, : self.end] = source[:, ends[0] - self.end : ends[0]]
            return
        for b, end in enumerate(ends):
            n = min(self.end, end)
            self.rows[b, self.end - n : self.end] = source[b, end - n : end]


class Store:
    """Entries by number, [b, p, d], reserved for the whole of `max_length`; memory is touched as it fills."""

    def __init__(self, batch: int, capacity: int, width: int, like: Tensor) -> None:
        self.rows = like.new_zeros(batch, capacity, width)

    def grow(self, capacity: int) -> None:
        """Makes room for `capacity` entries."""
        missing = capacity - self.rows.shape[1]
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(len(self.rows), missing, self.rows.shape[2])], 1)

    def write(self, entries: Tensor, step: Step | FixedStep, ratio: int) -> None:
        """entries [b, new, d] are those that the step's tokens complete, in order."""
        if isinstance(step, FixedStep):
            self._write_if_complete(entries, step.past, ratio)
            return
        for b, (past, new) in enumerate(zip(step.past, step.new)):
            first, last = past // ratio, (past + new) // ratio
            self.rows[b, first:last] = entries[b, : last - first]

    def _write_if_complete(self, entry: Tensor, past: Tensor, ratio: int) -> None:
        """entry [b, 1, d], of rows whose window it completes: what lies in the place of others stays."""
        if self.rows.shape[1] == 0:
            return
        place = (past // ratio).clamp_max(self.rows.shape[1] - 1)[..., None].expand_as(entry)
        complete = (past + 1) % ratio == 0
        self.rows.scatter_(1, place, torch.where(complete[..., None], entry, self.rows.gather(1, place)))

    def seen(self, step: Step | FixedStep, ratio: int) -> Any:
        """The entries up to the furthest row's last, [b, p, d]; of a fixed step all that there is room for."""
        if isinstance(step, FixedStep):
            return self.rows
        return self.rows[:, : max(past + new for past, new in zip(step.past, step.new)) // ratio]

    def put(self, number: int, entry: np.ndarray) -> None:
        """Writes one entry of a single sequence."""
        self.rows.numpy()[0, number] = entry

    def first(self, count: int) -> Any:
        """The first entries of a single sequence, [p, d]."""
        return self.rows.numpy()[0, :count]


class CodedTail(Tail):
    """A tail of keys in a number format. New ones, too, are read back from their codes."""

    def __init__(self, batch: int, keep: int, rewind: int, format: Format, like: Tensor) -> None:
        super().__init__(batch, keep, rewind, (format.bytes,), like.new_zeros(0, dtype=torch.uint8))
        self.format = format

    def extend(self, new: Tensor, step: Step | FixedStep) -> Tensor:
        return self.format.decode(super().extend(self.format.encode(new), step))

    def push(self, row: np.ndarray, past: int) -> np.ndarray:
        return self.format.decode_step(super().push(self.format.encode_step(row), past))


class CodedStore(Store):
    """Entries in a number format, handed out as they are: the reader decodes what it needs."""

    def __init__(self, batch: int, capacity: int, format: Format, like: Tensor) -> None:
        super().__init__(batch, capacity, format.bytes, like.new_zeros(0, dtype=torch.uint8))
        self.format = format

    def write(self, entries: Tensor, step: Step | FixedStep, ratio: int) -> None:
        super().write(self.format.encode(entries), step, ratio)

    def seen(self, step: Step | FixedStep, ratio: int) -> Coded:
        return Coded(super().seen(step, ratio), self.format)

    def put(self, number: int, entry: np.ndarray) -> None:
        super().put(number, self.format.encode_step(entry))

    def first(self, count: int) -> CodedStep:
        return CodedStep(super().first(count), self.format)


def unfinished_tokens(ratio: int, overlap: bool) -> int:
    """How many past tokens a later entry may still need: its own window's, and with overlap the whole window before."""
    return 2 * ratio - 1 if overlap else ratio - 1


class CompressorCache:
    """Of one compressor: (k, z) of the tokens that later entries still need, and the entries."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        width: int,
        batch: int,
        max_length: int,
        rewind: int,
        format: Format | None,
        like: Tensor,
    ) -> None:
        ratio, overlap = config.compress_ratio(layer), config.layer_kind(layer) == SPARSE
        self.ratio = ratio
        channels = 2 * (2 if overlap else 1) * width
        exact = like.new_zeros(0, dtype=torch.promote_types(like.dtype, torch.float32))
        self.tail = Tail(batch, unfinished_tokens(ratio, overlap), rewind, (channels,), exact)
        capacity = max_length // ratio
        self.store = CodedStore(batch, capacity, format, like) if format else Store(batch, capacity, width, like)


class LayerCache:
    """Of one layer: window keys, and what its mechanisms need."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        batch: int,
        max_length: int,
        rewind: int,
        storage: tuple[Format | None, Format | None],
        like: Tensor,
    ) -> None:
        keep, c, (entry, key) = config.sliding_window - 1, config.head_dim, storage
        self.window = CodedTail(batch, keep, rewind, entry, like) if entry else Tail(batch, keep, rewind, (c,), like)
        self.compressor = self.indexer = self.ids = self.conv = None
        if config.compress_ratio(layer):
            self.compressor = CompressorCache(config, layer, c, batch, max_length, rewind, entry, like)
        if config.layer_kind(layer) == SPARSE:
            self.indexer = CompressorCache(config, layer, config.index_head_dim, batch, max_length, rewind, key, like)
        memory = config.engram
        if memory and layer in memory.layers:
            self.ids = Tail(batch, memory.max_ngram - 1, rewind, (), like.new_zeros(0, dtype=torch.int64))
            if memory.kernel_size:
                reach = (memory.kernel_size - 1) * memory.max_ngram
                self.conv = Tail(batch, reach, rewind, (config.hc_mult, config.hidden_size), like)

    def tails(self) -> list[Tail]:
        parts = (self.window, self.ids, self.conv, *(c.tail for c in (self.compressor, self.indexer) if c))
        return [tail for tail in parts if tail is not None]

    def tensors(self) -> list[tuple[Tail | Store, Tensor]]:
        """Every holder of rows with its rows."""
        stores = [c.store for c in (self.compressor, self.indexer) if c]
        holders: list[Tail | Store] = [*self.tails(), *stores]
        return [(holder, holder.rows) for holder in holders]

    def appended(self, step: Step) -> list[Tensor]:
        """Copies of the rows that a step, `even`, has put in and that later tokens read, as they are read."""
        tails = self.tails()
        parts: list[tuple[Tail | Store, slice]] = [(x, slice(x.end - min(step.columns, x.hold), x.end)) for x in tails]
        for part in (self.compressor, self.indexer):
            if part is not None:
                first, last = step.past[0] // part.ratio, (step.past[0] + step.columns) // part.ratio
                parts.append((part.store, slice(first, last)))
        rows = [(holder, holder.rows[:, which].clone()) for holder, which in parts]
        return [x.format.decode(new) if isinstance(x, CodedTail | CodedStore) else new for x, new in rows]


class Cache:
    """The state of a batch of sequences. `Transformer.new_cache` makes one; a forward pass with it appends.

    Rows may have different lengths. After an error or an interruption the cache is as it was before the call.

    Raises:
        ValueError: sizes that are not positive, an unknown storage or one that does not fit the configuration.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[int],
        batch_size: int,
        max_length: int,
        *,
        rewind: int = 0,
        storage: str,
        like: Tensor,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 1), ("rewind", rewind, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: allowed are integers from {least}")
        self.config, self.max_length, self.rewind, self.storage = config, max_length, rewind, storage
        self.dtype = like.dtype
        used = formats(storage, config, like.dtype)
        self.layers = [LayerCache(config, i, batch_size, max_length, rewind, used, like) for i in layers]
        self._lengths = [0] * batch_size
        self._drafts = layers[0] == config.num_hidden_layers
        self._furthest = [0] * batch_size  # longest that each row has ever been: rewinding is measured from there

    @property
    def batch_size(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> Tensor:
        """int64 [b] on the CPU: tokens of each row."""
        return torch.tensor(self._lengths)

    def nbytes(self) -> int:
        """Bytes reserved; `model.accounting` computes the same from the configuration."""
        return sum(rows.nbytes for layer in self.layers for _, rows in layer.tensors())

    def begin(
        self, config: ModelConfig, ids: Tensor, lengths: Tensor | Sequence[int] | None, drafts: bool = False
    ) -> Step:
        """Checks a call's tokens against the cache. Nothing is changed. `drafts`: the call is of the MTP block.

        Raises:
            ValueError: another model or batch size, lengths out of range, or more tokens than `max_length` holds.
        """
        b, t = ids.shape
        if config != self.config:
            raise ValueError("cache was made for another model: its configuration differs")
        if drafts != self._drafts:
            made, needed = ("new_draft_cache", "new_cache") if self._drafts else ("new_cache", "new_draft_cache")
            raise ValueError(f"cache was made by {made}: this call needs one of {needed}")
        if b != self.batch_size:
            raise ValueError(f"ids has {b} rows: the cache was made for batch_size={self.batch_size}")
        new = [t] * b if lengths is None else [int(n) for n in lengths]
        if len(new) != b or min(new) < 0 or max(new) > t:
            raise ValueError(
                f"lengths={new}: one number per row ({b}), each from 0 to the {t} columns of ids, is needed"
            )
        for row, (past, n) in enumerate(zip(self._lengths, new)):
            if past + n > self.max_length:
                raise ValueError(
                    f"row {row} would have {past + n} tokens: the cache holds max_length={self.max_length}"
                )
        return Step(list(self._lengths), new, t)

    def grow(self, max_length: int) -> None:
        """Makes room for rows of up to `max_length` tokens, if there is less; what the cache holds stays.

        Raises:
            ValueError: more than `max_position_embeddings`.
        """
        longest = self.config.max_position_embeddings
        if max_length > longest:
            raise ValueError(f"max_length={max_length}: the configuration allows max_position_embeddings={longest}")
        self.max_length = max(max_length, self.max_length)
        for part in (part for layer in self.layers for part in (layer.compressor, layer.indexer) if part):
            part.store.grow(self.max_length // part.ratio)

    def fix(self) -> None:
        """Makes ready for `FixedStep`s. Ordinary steps may follow, too."""
        for layer in self.layers:
            for tail in layer.tails():
                tail.fix()

    def advance(self) -> None:
        """Counts a token in every row that a `FixedStep` has put in."""
        self._lengths = [n + 1 for n in self._lengths]
        self._furthest = [max(pair) for pair in zip(self._furthest, self._lengths)]

    @contextmanager
    def appending(self, step: Step) -> Iterator[None]:
        """Takes the step's tokens in, which the layers append meanwhile. `Undo` forgets them and goes no further."""
        with suppress(Undo), self._all_or_nothing():
            yield
            self._lengths = [past + n for past, n in zip(step.past, step.new)]
            self._furthest = [max(pair) for pair in zip(self._furthest, self._lengths)]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Undoes the block if it does not come to its end."""
        holders = [self, *(holder for layer in self.layers for holder, _ in layer.tensors())]
        before = [dict(vars(holder)) for holder in holders]
        try:
            yield
        except BaseException:
            for holder, state in zip(holders, before):
                vars(holder).update(state)
            raise

    def truncate(self, lengths: Tensor | Sequence[int] | int) -> None:
        """Cuts each row back to lengths[b] tokens, exactly as if the others had never been seen.

        Raises:
            ValueError: longer than the row, negative, or further back than `rewind` allows.
        """
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else [int(n) for n in lengths]
        if len(wanted) != self.batch_size:
            raise ValueError(f"lengths has {len(wanted)} values: the cache has {self.batch_size} rows")
        for row, (n, now, furthest) in enumerate(zip(wanted, self._lengths, self._furthest)):
            if not 0 <= n <= now:
                raise ValueError(f"lengths[{row}]={n}: allowed are 0 to the row's {now} tokens")
            if n < furthest - self.rewind:
                raise ValueError(
                    f"lengths[{row}]={n}: the row has been {furthest} tokens long and rewind={self.rewind} was declared"
                )
        counts = [now - n for now, n in zip(self._lengths, wanted)]
        with self._all_or_nothing():
            for layer in self.layers:
                for tail in layer.tails():
                    tail.drop(counts)
            self._lengths = wanted

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes a copy of row rows[i]; the number of rows may change.

        Raises:
            ValueError: no rows, or a row that does not exist.
        """
        order = [int(r) for r in rows]
        if not order or min(order) < 0 or max(order) >= self.batch_size:
            raise ValueError(f"rows={order}: allowed are row numbers 0 to {self.batch_size - 1}, at least one")
        with self._all_or_nothing():
            for layer in self.layers:
                for holder, tensor in layer.tensors():
                    holder.rows = tensor[torch.tensor(order, device=tensor.device)]
            self._lengths = [self._lengths[r] for r in order]
            self._furthest = [self._furthest[r] for r in order]

    def fork(self, copies: int = 1) -> "Cache":
        """A new cache with each row `copies` times; this one stays as it is. Raises ValueError for copies < 1."""
        if copies < 1:
            raise ValueError(f"copies={copies}: allowed are integers from 1")
        forked = copy.deepcopy(self)
        forked.reorder([row for row in range(self.batch_size) for _ in range(copies)])
        return forked


@dataclass(frozen=True)
class Continued(Layout):
    """The layout of a step's tokens, behind what the cache holds."""

    step: Step = Step([0], [0], 0)

    def _work_out_entries(self, ratio: int, keep: int) -> Entries:
        """The entries that the step completes, in rows of the compressor's tail followed by the new columns."""
        step, device = self.step, self.positions.device
        if step.even and (step.past[0] + step.columns) // ratio == step.past[0] // ratio:
            return _no_entries(self.positions, ratio)
        past = sent(step.past, device)[:, None]
        done = [(p + n) // ratio - p // ratio for p, n in zip(step.past, step.new)]
        number = past // ratio + torch.arange(max(done), device=device)
        exists = number < past // ratio + sent(done, device)[:, None]
        first = torch.where(exists, number * ratio - past + step.kept(keep), -1)
        complete = sent([(p + n) // ratio for p, n in zip(step.past, step.new)], device)[:, None]
        end = torch.minimum((self.positions + 1) // ratio, complete)  # columns that are not real see no more
        return Entries(first, (number > 0) & exists, number * ratio, torch.zeros_like(end), end)

    def first_rows(self, keep: int) -> Tensor | None:
        if self.step.even:
            return None
        past = sent(self.step.past, self.positions.device)[:, None]
        return (self.step.kept(keep) - past).clamp_min(0).expand_as(self.positions)


@dataclass(frozen=True)
class Fixed(Layout):
    """The layout of a `FixedStep`: one token in each row, and the entry that it would complete; the store takes those
    that are.
    """

    step: FixedStep | None = None

    def _work_out_entries(self, ratio: int, keep: int) -> Entries:
        number, end = self.positions // ratio, (self.positions + 1) // ratio
        first = torch.full_like(number, keep + 1 - ratio)
        return Entries(first, number > 0, number * ratio, torch.zeros_like(end), end)

    def first_rows(self, keep: int) -> Tensor:
        return (keep - self.positions).clamp_min(0)


def _no_entries(positions: Tensor, ratio: int) -> Entries:
    """Of a step that completes none in any row."""
    none, end = positions[:, :0], (positions + 1) // ratio
    return Entries(none, none.bool(), none, torch.zeros_like(end), end)


def continue_layout(step: Step | FixedStep, device: torch.device) -> Layout:
    """Positions of a step's tokens."""
    if isinstance(step, FixedStep):
        return Fixed(positions=step.past, step=step)
    if step.even:
        return Continued(
            positions=torch.arange(step.past[0], step.past[0] + step.columns, device=device)[None], step=step
        )
    columns = torch.arange(step.columns, device=device)
    return Continued(positions=sent(step.past, device)[:, None] + columns, step=step)


def sent(numbers: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host on the device; nobody waits until they are there."""
    pinned = device.type != "cpu" and torch.cuda.is_available()
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
