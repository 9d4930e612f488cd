"""What V3 and V3.2 remember: for each token one latent, its rotated key, and in V3.2 an index key.

    bytes = layers batch max_length (kv_lora_rank + qk_rope_head_dim + index_head_dim) bytes of a value

b batch rows · t new tokens · s rows of the cache · w channels
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import Step
from .config import LineageConfig


class LatentCache:
    """Latents and index keys of `batch_size` sequences of up to `max_length` tokens.

    Rows may differ in length. Nothing that a length counts is written over, so that a call that fails changes nothing.
    """

    def __init__(self, config: LineageConfig, batch_size: int, max_length: int, like: Tensor) -> None:
        for name, size in (("batch_size", batch_size), ("max_length", max_length)):
            if size < 1:
                raise ValueError(f"{name}={size}: at least 1")
        self.config, self.max_length = config, max_length
        self.past = [0] * batch_size
        widths = [config.kv_lora_rank + config.qk_rope_head_dim, config.index_head_dim or 0]
        self.rows = [
            tuple(like.new_zeros(batch_size, max_length, width) for width in widths)
            for _ in range(config.num_hidden_layers)
        ]

    @property
    def lengths(self) -> Tensor:
        """int64 [b], on the CPU."""
        return torch.tensor(self.past)

    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.rows for part in layer)

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Cuts each row back to a length. Raises ValueError where it is longer than the row."""
        wanted = [int(n) for n in lengths]
        if len(wanted) != len(self.past) or any(not 0 <= n <= past for n, past in zip(wanted, self.past)):
            raise ValueError(f"lengths={wanted}: allowed are up to {self.past}")
        self.past = wanted

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Row i becomes what row rows[i] was. Raises IndexError for a row that is not there."""
        order = [int(row) for row in rows]
        if any(not 0 <= row < len(self.past) for row in order):
            raise IndexError(f"rows={order}: allowed are 0 to {len(self.past) - 1}")
        self.rows = [tuple(part[order] for part in layer) for layer in self.rows]
        self.past = [self.past[row] for row in order]

    def begin(self, config: LineageConfig, ids: Tensor, lengths: Tensor | Sequence[int] | None) -> Step:
        """What a call with the new tokens ids [b, t] would append, `lengths` of them in each row.

        Raises:
            ValueError: another configuration or batch size, lengths out of range, or more tokens than fit.
        """
        b, t = ids.shape
        if config != self.config:
            raise ValueError("cache: it was made for a model of another configuration")
        if b != len(self.past):
            raise ValueError(f"ids has {b} rows: the cache has {len(self.past)}")
        new = [t] * b if lengths is None else [int(n) for n in lengths]
        if len(new) != b or any(not 0 <= n <= t for n in new):
            raise ValueError(f"lengths={new}: allowed are {b} numbers from 0 to {t}")
        longest = max(past + n for past, n in zip(self.past, new))
        if longest > self.max_length:
            raise ValueError(f"{longest} tokens: the cache was made for max_length={self.max_length}")
        return Step(list(self.past), new, t)

    def append(self, layer: int, step: Step, *new: Tensor) -> tuple[Tensor, ...]:
        """Writes [b, t, w] behind what each row has, padding as far as there is room; all rows up to the last,
        [b, s, w].
        """
        for part, rows in zip(self.rows[layer], new):
            if step.even:
                part[:, step.past[0] : step.past[0] + step.columns] = rows
                continue
            for b, past in enumerate(step.past):
                part[b, past : past + step.columns] = rows[b, : self.max_length - past]
        last = min(max(step.past) + step.columns, self.max_length)
        return tuple(part[:, :last] for part in self.rows[layer])
