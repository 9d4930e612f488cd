"""Where each token stands: in its document, in the window and among the compressed entries (V4 4.1; spec B.3, B.4).

A row of a batch holds one sequence, or several packed documents with padding between or on either side. Documents never
see each other, and each is compressed on its own: windows of m tokens start at the document's first token, its tail is
dropped.
Everything that attention, compression and n-grams need to know about that is worked out here, once per forward pass.

b batch · t tokens · p compressed entries of a row, t // m at most
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """The compressed entries of a row for one ratio m: where they come from and which of them each token sees."""

    first: Tensor | None  # [b, p] row of the first token of the entry's window, -1 = no such entry; None: 0, m, 2m, ...
    follows: Tensor | None  # [b, p] the m rows before belong to the same document
    positions: Tensor  # [b|1, p] position in its document of the entry's first token: where it is rotated to
    start: Tensor  # [b|1, t] a token sees the entries [start, end)
    end: Tensor  # [b|1, t] = start + floor((position + 1) / m)


@dataclass(frozen=True)
class Layout:
    """Positions and visibility of every token; `real` and `start` are None where every row is one whole sequence.

    `cache.Continued` and `cache.Fixed` are layouts of tokens that follow what a cache holds; only there is a past, and
    rows of it are put before the call's own: `kept` counts them.
    """

    positions: Tensor  # [b|1, t] position in the document, 0-based
    start: Tensor | None = None  # [b, t] first row of the token's document; of padding: one past its own row
    real: Tensor | None = None  # [b, t] not padding
    step: Any = None  # the call's `cache.Step` or `cache.FixedStep`, behind a cache only
    _memo: dict[Any, Any] = field(default_factory=dict)

    def entries(self, ratio: int, keep: int = 0) -> Entries:
        """The entries for compression ratio m; `keep` past rows are put before the call's own, if there are."""
        return self.once(("entries", ratio, keep), lambda: self._work_out_entries(ratio, keep))

    def once(self, key: Any, work_out: Callable[[], Any]) -> Any:
        """What many layers need alike, worked out at first use."""
        if key not in self._memo:
            self._memo[key] = work_out()
        return self._memo[key]

    def _work_out_entries(self, ratio: int, keep: int) -> Entries:
        if self.start is None or self.real is None:
            return _regular_entries(self.positions, ratio)
        return _packed_entries(self.positions, self.start, self.real, ratio)

    def first_rows(self, keep: int) -> Tensor | None:
        """[b|1, t] first row of the token's document, in rows with up to `keep` past ones put before; None = row 0."""
        return self.start


def make_layout(ids: Tensor, documents: Tensor | None) -> Layout:
    """The layout of ids [b, t]; documents [b, t] says which document each token belongs to, -1 = padding.

    Raises:
        ValueError: as `check_documents`; values on a GPU are not waited for, an assertion of the device ends it.
        RuntimeError: the same, in compiled code.
    """
    t = ids.shape[1]
    rows = torch.arange(t, device=ids.device)[None]
    if documents is None:
        return Layout(positions=rows)
    check_documents(documents, ids)
    real = documents >= 0
    start = torch.where(_opens(documents), rows, 0).cummax(1).values
    start = torch.where(real, start, rows + 1)
    return Layout(positions=(rows - start).clamp_min(0), start=start, real=real)


def remembered(work_out: Callable[..., Any]) -> Callable[..., Any]:
    """`work_out`, once for the same arguments; anew where code is compiled or exported, whose tensors end with it."""
    once = functools.lru_cache(maxsize=64)(work_out)

    @functools.wraps(work_out)
    def recalled(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:  # but a fake one
            return work_out(*arguments)
        return once(*arguments)

    return recalled


def check_documents(documents: Tensor, ids: Tensor) -> None:
    """Whether `documents` may go with ids [b, t].

    Raises:
        ValueError: another shape or type, an id below -1, or a document in more than one piece.
        RuntimeError: such values in compiled code.
    """
    if documents.shape != ids.shape:
        raise ValueError(f"documents has shape {tuple(documents.shape)}: it must be that of ids, {tuple(ids.shape)}")
    if documents.dtype != torch.int64:
        raise ValueError(f"documents has dtype {documents.dtype}: it must be torch.int64")
    heads = torch.where(_opens(documents), documents, -1).sort(1).values
    again = (heads[:, 1:] == heads[:, :-1]) & (heads[:, 1:] >= 0)
    if not documents.is_cpu or torch.compiler.is_compiling():
        allowed = "documents: allowed are ids >= 0, each in one piece of a row, and -1 for padding"
        torch._assert_async((documents >= -1).all() & ~again.any(), allowed)
        return
    if int(documents.min()) < -1:
        raise ValueError(f"documents holds {int(documents.min())}: allowed are ids >= 0 and -1 for padding")
    if again.any():
        row, column = again.nonzero()[0].tolist()
        raise ValueError(
            f"documents: id {int(heads[row, column])} has more than one piece in row {row}; a document is contiguous"
        )


def check_reach(layout: Layout, longest: int) -> None:
    """Raises ValueError for a document of more than `longest` tokens (max_position_embeddings); of packed ones on a
    GPU, an assertion of the device does, of those in compiled code a RuntimeError.
    """
    positions = layout.positions
    if positions.shape[1] <= longest:
        return
    if layout.real is not None and (not positions.is_cpu or torch.compiler.is_compiling()):
        torch._assert_async((positions < longest).all(), f"documents: allowed is max_position_embeddings={longest}")
        return
    tokens = positions.shape[1] if layout.real is None else int(positions.max()) + 1
    if tokens > longest:
        raise ValueError(f"a document has {tokens} tokens: the configuration allows max_position_embeddings={longest}")


def _opens(documents: Tensor) -> Tensor:
    """bool [b, t]: a document, or padding, begins here."""
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return opens


def _regular_entries(positions: Tensor, ratio: int) -> Entries:
    t = positions.shape[1]
    first = torch.arange(0, t // ratio * ratio, ratio, device=positions.device)[None]
    return Entries(None, None, first, torch.zeros_like(positions), (positions + 1) // ratio)


def _packed_entries(positions: Tensor, document: Tensor, real: Tensor, ratio: int) -> Entries:
    """`document` is the first row of each token's document, as in `Layout.start`."""
    b, t = document.shape
    rows = torch.arange(t, device=document.device).expand(b, t)
    closes = real & ((positions + 1) % ratio == 0)
    end = closes.cumsum(1)  # entries of the row that are complete once this token is in
    start = end - torch.where(real, (positions + 1) // ratio, 0)  # padding sees none
    slot = torch.where(closes, end - 1, t // ratio)  # one slot more takes the tokens that close nothing
    first = rows.new_full((b, t // ratio + 1), -1).scatter_(1, slot, rows - ratio + 1)[:, :-1]
    positions = positions.gather(1, first.clamp_min(0))
    return Entries(first, (positions > 0) & (first >= 0), positions, start, end)
