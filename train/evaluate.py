"""Held-out bits per byte, of a model and of the trigram baseline, on the same bytes.

bits per byte = Σ -ln p(byte) / (ln 2 · bytes)      over all byte targets of the chosen rows; bos is never a target
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .corpus import Corpus
from .data import IGNORED, HeldOut, Stream
from .trigram import Trigram


@torch.no_grad()
def bits_per_byte(model: nn.Module, held_out: HeldOut, batch_size: int, dtype: torch.dtype = torch.float32) -> float:
    """The model's bits per byte on the held-out rows, each row on its own; leaves the model in the mode it was in."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, count = 0.0, 0
    for batch in held_out.batches(batch_size):
        batch = batch.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(batch.ids, documents=batch.documents).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="sum")
        nats += losses.item()
        count += int((batch.targets != IGNORED).sum())
    model.train(was_training)
    return nats / math.log(2) / count


def trigram_bits_per_byte(corpus: Corpus, held_out: HeldOut) -> float:
    """The trigram model of the training documents on the same bytes, with its two bytes of context always at hand."""
    trigram = Trigram(Stream(corpus.train, held_out.stream.length).tokens)
    return float(trigram.bits(held_out.stream.tokens)[held_out.target_positions()].mean())
