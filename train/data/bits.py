"""Bits of held-out text: of a model's targets, and of the trigram baseline on the same bytes.

bits per byte = Σ -log2 p(token) / bytes        over all targets of the chosen rows, and the bytes of the documents
                                                that they are made of (`scored.py`); bos is never a target
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .corpus import AnyDocument
from .rows import IGNORED, Batch, Stream
from .scored import Scored
from .trigram import Trigram

TRIGRAM_BYTES = 1 << 25  # of a corpus that may be larger than memory


@torch.no_grad()
def target_bits(model: nn.Module, batches: list[Batch], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The bits of each target, float64 [targets], in order; leaves the model in the mode it was in."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = []
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(batch.ids, documents=batch.documents).logits
        targets = batch.targets.flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        nats.append(losses[targets != IGNORED].cpu().double())
    model.train(was_training)
    return torch.cat(nats).numpy() / math.log(2)


def trigram_bits_per_byte(train: Sequence[AnyDocument], scored: Scored) -> float:
    """The trigram model of training documents on the scored bytes, with its two bytes of context always at hand."""
    trigram = Trigram(Stream(train, 1).tokens)
    return float(trigram.bits(Stream(scored.documents, 1).tokens)[scored.places].mean())


def first(documents: Sequence[AnyDocument], size: int) -> list[AnyDocument]:
    """Documents from the first on, as long as they come to `size` bytes; at least one."""
    ends = np.cumsum([document.size for document in documents])
    return list(documents[: max(1, int(np.searchsorted(ends, size, side="right")))])
