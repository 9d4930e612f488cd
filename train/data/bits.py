"""Bits of held-out text under a model, each row on its own.

bits per byte = Σ -log2 p(token) / bytes        over all targets of the chosen rows, and the bytes of the documents
                                                that they are made of (`scored.py`); bos is never a target
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .rows import IGNORED, Batch


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
