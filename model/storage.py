"""The cache in the released number formats (V4 3.4, 3.6; spec B.2.2, B.3, B.5, B.10, D.1).

    window keys, entries   [ E4M3, the channels without position | bfloat16, the rotary ones | a scale per 64 codes ]
    index keys             [ E2M1, two in a byte, of the Hadamard rotation                   | a scale per 32 codes ]

A scale is a byte, a power of two; those of an entry are padded to 8 bytes. At the released sizes an entry takes
448 + 128 + 8 = 584 bytes, an index key 64 + 4 = 68. Where the channels are no multiple of a group, the last group is
smaller.

Rounded is what is stored, once, and nothing reads it unrounded: a token's own key, too, is read back. Exact remain the
compressors' inputs of open windows, Engram's ids and rows, and all queries (the release rounds index queries as well).

Reading costs a temporary: all index keys or HCA entries of one layer, [b, p, c], or the window; of a CSA layer's
entries the picked ones alone where they are fewer, as for one token. In numpy, index keys are decoded a tile at a time.

Codes depend on the key alone, so that any split gives the same ones; where two ways to compute a key differ in its last
bit, and that bit decides a rounding, they differ by one step.

b batch · t queries · k picks · p entries · c channels · r rotary channels · n bytes of a stored row
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import dequantize, hadamard, quantize
from ..kernels.quant.step import dequantize_step, quantize_e4m3_step
from .config import ModelConfig
from .kinds import SPARSE

STORAGES = ("exact", "released")
ENTRY_GROUP, KEY_GROUP = 64, 32


class EntryFormat:
    """Window keys and entries, [..., c] to bytes [..., n] and back; c - r channels in E4M3, the last r in bfloat16."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.dtype, self.plain = dtype, config.head_dim - config.qk_rope_head_dim
        values, groups = self.plain + 2 * config.qk_rope_head_dim, -(-self.plain // ENTRY_GROUP)
        self.codes, self.rotary = slice(0, self.plain), slice(self.plain, values)
        self.scales = slice(values, values + groups)
        self.bytes = values + -(-groups // 8) * 8

    def encode(self, x: Tensor) -> Tensor:
        rows = x.new_zeros(*x.shape[:-1], self.bytes, dtype=torch.uint8)
        codes, scales = quantize(x[..., : self.plain], "e4m3", block=(1, ENTRY_GROUP))
        rotary = x[..., self.plain :].to(torch.bfloat16).contiguous()
        for part, values in ((self.codes, codes), (self.rotary, rotary), (self.scales, scales)):
            rows[..., part] = values.view(torch.uint8)
        return rows

    def decode(self, rows: Tensor) -> Tensor:
        codes, scales = rows[..., self.codes], rows[..., self.scales]
        codes, scales = codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
        rotary = rows[..., self.rotary].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        plain = dequantize(codes, scales, block=(1, ENTRY_GROUP), dtype=self.dtype)
        return torch.cat([plain, rotary.to(self.dtype)], -1)

    def encode_step(self, x: np.ndarray) -> np.ndarray:
        row = np.zeros(self.bytes, np.uint8)
        row[self.codes], row[self.scales] = quantize_e4m3_step(x[: self.plain], ENTRY_GROUP)
        row[self.rotary] = torch.from_numpy(x[self.plain :]).to(torch.bfloat16).view(torch.uint8).numpy()
        return row

    def decode_step(self, rows: np.ndarray) -> np.ndarray:
        plain = dequantize_step(rows[:, self.codes], rows[:, self.scales], "e4m3", ENTRY_GROUP)
        rotary = rows[:, self.rotary].view(np.uint16).astype(np.uint32) << 16  # bfloat16 is float32's upper half
        return np.concatenate((plain, rotary.view(np.float32)), 1)


class KeyFormat:
    """Index keys, [..., c] to bytes [..., n]. They come back rotated: their products are those with rotated queries.

    Raises:
        ValueError: the index head dim is no power of two.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        width = config.index_head_dim
        if width < 2 or width & (width - 1):
            raise ValueError(
                f"index_head_dim={width}: storage='released' rotates index keys by a Hadamard matrix, allowed are "
                "powers of two from 2"
            )
        self.dtype = dtype
        self.codes, self.scales = slice(0, width // 2), slice(width // 2, None)
        self.bytes = width // 2 + -(-width // KEY_GROUP)
        self.matrix = hadamard(torch.eye(width, device="cpu")).numpy()

    def rotate(self, x: Tensor) -> Tensor:
        return hadamard(x)

    def encode(self, x: Tensor) -> Tensor:
        codes, scales = quantize(self.rotate(x), "e2m1", block=(1, KEY_GROUP))
        return torch.cat([codes, scales.view(torch.uint8)], -1)

    def decode(self, rows: Tensor) -> Tensor:
        codes, scales = rows[..., self.codes], rows[..., self.scales].view(torch.float8_e8m0fnu)
        return dequantize(codes, scales, block=(1, KEY_GROUP), dtype=self.dtype)

    def rotate_step(self, x: np.ndarray) -> np.ndarray:
        return x.dot(self.matrix)

    def encode_step(self, x: np.ndarray) -> np.ndarray:
        return self.encode(torch.from_numpy(x)[None])[0].numpy()

    def decode_step(self, rows: np.ndarray) -> np.ndarray:
        return dequantize_step(rows[:, self.codes], rows[:, self.scales], "e2m1", KEY_GROUP)


Format = EntryFormat | KeyFormat


def formats(storage: str, config: ModelConfig, dtype: torch.dtype) -> tuple[Format | None, Format | None]:
    """Of window keys and entries, and of index keys; None is the model's dtype as it is.

    Raises:
        ValueError: an unknown storage, or one that does not fit the configuration.
    """
    check_storage(storage)
    if storage == "exact":
        return None, None
    return EntryFormat(config, dtype), KeyFormat(config, dtype) if SPARSE in config.layer_types else None


def check_storage(storage: str) -> None:
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: allowed are {' and '.join(map(repr, STORAGES))}")


class Coded(NamedTuple):
    """Entries as they are stored, bytes [b, p, n]: whoever reads them says which."""

    rows: Tensor
    format: Format

    def values(self) -> Tensor:
        """[b, p, c]"""
        return self.format.decode(self.rows)

    def picked(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Values, and where among them the picks [b, t, k] are: the picked alone, [b, t k, c], if fewer than all."""
        b, t, k = picks.shape
        if t * k >= self.rows.shape[1]:
            return self.values(), picks
        rows = self.rows[torch.arange(b, device=picks.device)[:, None], picks.clamp_min(0).view(b, -1)]
        places = torch.arange(t * k, device=picks.device).view(t, k)
        return self.format.decode(rows), torch.where(picks < 0, -1, places)


def values(entries: Tensor | Coded) -> Tensor:
    """[b, p, c] of entries in any storage; decoded ones are a temporary of that size."""
    return entries.values() if isinstance(entries, Coded) else entries


def picked(entries: Tensor | Coded, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that hold all picks, and where among them the picks [b, t, k] are."""
    return entries.picked(picks) if isinstance(entries, Coded) else (entries, picks)


class CodedStep:
    """The same of one sequence in numpy, bytes [p, n]: what is indexed is decoded."""

    def __init__(self, rows: np.ndarray, format: Any) -> None:
        self.rows, self.format = rows, format

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        return self.format.decode_step(self.rows[which])
