"""What a model has seen, as `generate` of transformers asks for it.

transformers counts columns of a padded batch; our cache counts each row's own tokens, wherever padding stands:

    row 0   . . a b c | d      columns 5, then 6       tokens 3, then 4
    row 1   a b c d e | f                              tokens 5, then 6
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..model.cache import Cache as Rows
from ..model.transformer import Output, Transformer

REWIND = 64  # tokens that assisted generation may take back at once
FEWEST = 256  # tokens that there is room for at first


class AbyssalCache(Cache):
    """Empty at first. It grows as it fills, and is cut back, reordered and copied as those of transformers are.

    Nothing is differentiated through it.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows: Rows | None = None
        self.columns, self.rewind = 0, 0

    def read(self, model: Transformer, ids: Tensor, mask: Tensor | None) -> Output:
        """The pass over ids [b, t], which are appended; `mask` [b, t] is 0 where there is padding.

        Raises:
            ValueError: as `Transformer.forward`, or a cache that is of another model or full.
        """
        order = None if mask is None else (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
        lengths = None if mask is None else mask.count_nonzero(1).tolist()
        seen = [0] if self.rows is None else self.rows.lengths.tolist()
        most = max(seen) + (max(lengths) if lengths else ids.shape[1])
        room = min(model.config.max_position_embeddings, max(FEWEST, 2 * most))
        if self.rows is None:
            self.rows = model.new_cache(len(ids), max(room, most), rewind=self.rewind)
        elif most > self.rows.max_length:
            self.rows.grow(max(room, most))
        out = model(ids if order is None else ids.gather(1, order), cache=self.rows, lengths=lengths)
        self.columns += ids.shape[1]
        if mask is not None:  # back to where the tokens stood; what padding gets says nothing
            back = (mask.ne(0).cumsum(1) - 1).clamp_min(0)[..., None].expand_as(out.hidden)
            out = Output(out.hidden.gather(1, back), out.head)
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.rows is None else self.rows.batch_size

    @property
    def is_croppable(self) -> bool:
        return self.rewind > 0

    def activate_past_recording(self) -> None:
        """Raises ValueError where tokens have been read already: what could be taken back is gone."""
        if self.rows is not None and self.rows.rewind < REWIND:
            raise ValueError(f"the cache holds {self.columns} tokens and cannot be cut back: begin with a new one")
        self.rewind = REWIND

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back that many columns (a number up to 0), which hold a token in every row.

        Raises:
            ValueError: a positive number, or more than can be taken back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove}: allowed are 0 and negative numbers")
        if self.rows is not None and tokens_to_remove:
            self.rows.truncate(self.rows.lengths + tokens_to_remove)
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.rows is not None:
            self.rows.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        self.rows, self.columns = None, 0

    def update(self, *arguments: Any, **options: Any) -> Any:
        """Raises TypeError: `read` appends, whole passes at a time."""
        raise TypeError("AbyssalCache belongs to AbyssalForCausalLM: no other model can append to it")
