"""Held-out bits per byte, of a model and of the trigram baseline, on the same bytes.

bits per byte = Σ -ln p(token) / (ln 2 · bytes)     over all targets of the chosen rows, and the bytes of the documents
                                                    that they are made of; bos is never a target
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .corpus import AnyDocument, Corpus
from .rows import Batch, HeldOut, Stream
from .trigram import Trigram

TRIGRAM_BYTES = 1 << 25  # of a corpus that may be larger than memory


def bits_per_byte(
    model: nn.Module,
    held_out: HeldOut,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    sizes: np.ndarray | None = None,
) -> float:
    """The model's bits per byte on the held-out rows, each row on its own; leaves the model in the mode it was in.

    `sizes`: bytes that each token of the held-out stream is made of; None = one.
    """
    return total_bits(model, held_out.batches(batch_size), dtype) / count_bytes(held_out, sizes)


@torch.no_grad()
def total_bits(model: nn.Module, batches: list[Batch], dtype: torch.dtype = torch.float32) -> float:
    """The bits of all targets; leaves the model in the mode it was in."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(batch.ids, documents=batch.documents).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")
        nats += losses.item()
    model.train(was_training)
    return nats / math.log(2)


def count_bytes(held_out: HeldOut, sizes: np.ndarray | None = None) -> int:
    """Bytes that the held-out targets are made of."""
    targets = held_out.target_positions()
    return len(targets) if sizes is None else int(sizes[targets].sum(dtype=np.int64))


def trigram_bits_per_byte(corpus: Corpus, held_out: HeldOut, sizes: np.ndarray | None = None) -> float:
    """The trigram model of the training documents on the same bytes, with its two bytes of context always at hand.

    With `sizes` (as of `bits_per_byte`) the model counts the first TRIGRAM_BYTES of the training documents at most.
    """
    documents = corpus.train if sizes is None else _first(corpus.train, TRIGRAM_BYTES)
    trigram = Trigram(Stream(documents, held_out.stream.length).tokens)
    if sizes is None:
        return float(trigram.bits(held_out.stream.tokens)[held_out.target_positions()].mean())
    bits = trigram.bits(Stream(corpus.held_out, held_out.stream.length).tokens)
    return float(bits[_bytes_of(held_out, sizes)].mean())


def _bytes_of(held_out: HeldOut, sizes: np.ndarray) -> np.ndarray:
    """Where the bytes of the rows' targets lie in the stream of bytes: in both streams bos takes one place."""
    places = sizes.astype(np.int64) + (np.asarray(held_out.stream.tokens) == held_out.stream.bos)
    starts = np.cumsum(places) - places
    targets = held_out.target_positions()
    within = np.arange(int(places[targets].sum())) - np.repeat(
        np.cumsum(places[targets]) - places[targets], places[targets]
    )
    return np.repeat(starts[targets], places[targets]) + within


def _first(documents: Sequence[AnyDocument], size: int) -> list[AnyDocument]:
    """Documents from the first on, as long as they come to `size` bytes; at least one."""
    ends = np.cumsum([document.size for document in documents])
    return list(documents[: max(1, int(np.searchsorted(ends, size, side="right")))])
