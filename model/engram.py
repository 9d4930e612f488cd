"""Engram, conditional memory: rows of hashed n-gram tables, gated into the streams (arXiv 2601.07372; spec 1).

    e_t    = concat of the table rows at hash(x'_{t-n+1..t}),  n = 2..N, k heads per order;  x' canonical token ids
    v_t    = W_V e_t  shared by the streams,   k_t[j] = W_K[j] e_t
    s      = <RMSNorm_h(X_t[j]), RMSNorm_k(k_t[j])> / sqrt(d),   g = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))
    X_t[j] += vg + silu( conv( RMSNorm_c(vg) ) ),   vg = g v_t;   conv: depthwise, causal, dilation N, zero at the start

The signed root is in every released implementation, though not in the paper's formula. n-grams and the convolution stop
at a document's first token. Table rows start as N(0, initializer_range^2), a choice of ours: no source states it.

b batch · t tokens · n streams · d width · m memory width · r table rows
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import engram_gate, engram_hash, engram_multipliers, engram_primes, rms_norm
from .cache import LayerCache
from .config import EngramConfig, ModelConfig
from .kept import KeepingModule
from .layout import Layout, make_layout, remembered
from .tables import make_table


class Engram(KeepingModule):
    """What the memory adds to streams [b, t, n, d]."""

    KEPT = ("h_norm", "k_norm", "conv_norm", "canonical")

    def __init__(self, config: ModelConfig, memory: EngramConfig, layer: int) -> None:
        super().__init__()
        n, d, width = config.hc_mult, config.hidden_size, (memory.max_ngram - 1) * memory.heads * memory.head_dim
        self.memory, self.layer, self.streams = memory, layer, n
        self.std, self.eps = config.initializer_range, config.rms_norm_eps
        self.classes = memory.canonical_vocab_size or config.vocab_size
        moduli = engram_primes(memory.vocab_size, len(memory.layers), memory.max_ngram, memory.heads)
        multipliers = engram_multipliers(self.classes, memory.max_ngram, layer, memory.seed)
        self.moduli = tuple(map(tuple, moduli[memory.layers.index(layer)]))  # [order][head], all distinct
        self.multipliers = tuple(multipliers.tolist())
        rows = sum(map(sum, self.moduli))
        self.register_buffer("canonical", torch.empty(config.vocab_size, dtype=torch.int64))
        self.table = make_table(rows, memory.head_dim)
        self.wkv = nn.Linear(width, (n + 1) * d, bias=False)
        self.h_norm = nn.Parameter(torch.empty(n, d, dtype=torch.float32))
        self.k_norm = nn.Parameter(torch.empty(n, d, dtype=torch.float32))
        if memory.kernel_size:
            self.conv_norm = nn.Parameter(torch.empty(n, d, dtype=torch.float32))
            self.conv = nn.Parameter(torch.empty(memory.kernel_size, n, d))
        self._read: tuple[Tensor, int, int] | None = None
        self._set = 0  # how often `canonical` has been set: compiled code is made anew then
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table.weight, std=self.std)
        nn.init.normal_(self.wkv.weight, std=self.std)
        nn.init.ones_(self.h_norm)
        nn.init.ones_(self.k_norm)
        if self.memory.kernel_size:
            nn.init.ones_(self.conv_norm)
            nn.init.zeros_(self.conv)
        self.canonical.copy_(torch.arange(len(self.canonical)) % self.classes)
        self._set += 1

    def set_canonical(self, lookup: Tensor) -> None:
        """Sets the tokenizer compression: lookup int64 [vocabulary] to canonical ids (`compress_vocabulary` makes one).

        Raises:
            ValueError: another length, or another number of classes than `engram.canonical_vocab_size`.
        """
        if lookup.shape != self.canonical.shape:
            raise ValueError(f"lookup has shape {tuple(lookup.shape)}: it must be {tuple(self.canonical.shape)}")
        classes = int(lookup.max()) + 1
        if classes != self.classes:
            raise ValueError(f"engram.canonical_vocab_size={self.classes}: allowed is {classes}, for this vocabulary")
        self.canonical.copy_(lookup)
        self._set += 1

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._set += 1

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "canonical":
            self._set += 1

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read of `canonical`: the versions of a copy's tensors begin anew."""
        return {**self.__dict__, "_read": None}

    def forward(self, streams: Tensor, ids: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        embedded = self.table(self.rows(ids, layout, cache))  # [b, t, m]
        keys = self.wkv(embedded).unflatten(-1, (self.streams + 1, -1))
        value = keys[:, :, self.streams]
        gated = engram_gate(streams, keys[:, :, : self.streams], value, self.h_norm, self.k_norm, eps=self.eps)
        if not self.memory.kernel_size:
            return gated
        normed = rms_norm(gated, None, self.eps) * self.conv_norm.to(gated.dtype)
        past = normed if cache is None or cache.conv is None else cache.conv.extend(normed, layout.step)
        return gated + F.silu(self._convolve(past, layout.positions))

    def look_ups(self, ids: Tensor, documents: Tensor | None, canonical: Tensor) -> Tensor:
        """Table rows of ids [b, t] ahead of the pass, worked out where `canonical`, a copy of our buffer, is."""
        return self._hash(ids, canonical, make_layout(ids, documents), None)

    def rows(self, ids: Tensor, layout: Layout, cache: LayerCache | None = None) -> Tensor:
        """Table rows [b, t, orders * heads] of each token's n-grams."""
        return self._hash(ids, self.canonical, layout, cache)

    def _hash(self, ids: Tensor, canonical: Tensor, layout: Layout, cache: LayerCache | None) -> Tensor:
        memory, t = self.memory, ids.shape[1]
        ids = canonical[ids]
        if cache is not None and cache.ids is not None:
            ids = cache.ids.extend(ids, layout.step)
        start = layout.first_rows(memory.max_ngram - 1)
        if start is not None and ids.shape[1] > t:  # the past rows are looked back at, never looked up
            start = torch.cat([start[:, :1].expand(-1, ids.shape[1] - t), start], 1)
        hashing = _hashing(self.multipliers, self.moduli, ids.device)
        return engram_hash(ids, *hashing, pad=self._pad(canonical), start=start)[:, -t:]

    def _pad(self, canonical: Tensor) -> int:
        """The canonical id of what stands before a document; read from the device once, and again when it changes.

        In compiled code it is a constant: there only `set_canonical` and loading change it, no write into the buffer.
        """
        if torch.compiler.is_dynamo_compiling() or canonical.is_inference():  # which has no version
            return _number(canonical, self.memory.pad_token_id, self._set)
        if self._read is None or self._read[0] is not canonical or self._read[1] != canonical._version:
            self._read = canonical, canonical._version, int(canonical[self.memory.pad_token_id])
        return self._read[2]

    def _convolve(self, x: Tensor, positions: Tensor) -> Tensor:
        """sum_j conv[last - j] x[t - j N] at `positions`, x's last rows; taps before a document's first token are 0."""
        taps, t = len(self.conv), positions.shape[1]
        reach = (taps - 1) * self.memory.max_ngram
        x = F.pad(x, (0, 0, 0, 0, reach, 0))  # a row for every tap, also where there is no past
        out = x[:, -t:] * self.conv[-1].to(x.dtype)
        for j in range(1, taps):
            back = j * self.memory.max_ngram
            inside = (positions >= back)[..., None, None]
            out = out + torch.where(inside, x[:, -t - back : -back], 0) * self.conv[taps - 1 - j].to(x.dtype)
        return out


@remembered
def _hashing(
    multipliers: tuple[int, ...], moduli: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Multipliers, moduli and offsets of `engram_hash`, on the device once and for all."""
    sizes = torch.tensor(moduli)
    offsets = sizes.flatten().cumsum(0) - sizes.flatten()
    return torch.tensor(multipliers).to(device), sizes.to(device), offsets.to(device)


def _number(table: Tensor, place: int, of: int) -> int:
    return int(table[place])


_number._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in kernels/backend.py
