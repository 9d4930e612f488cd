"""What teaches the indexer, on its picks.

t tokens · h heads · d head dim of the attention · s bytes of an element
"""

from .attention import Attention
from .device import Work
from .index_topk import Indexer


def index_loss(indexer: Indexer, attention: Attention) -> Work:
    """Teacher and student on the picks: reads q, entries, lse, the indexer's inputs and the picks."""
    t, h, d, s = indexer.tokens, attention.heads, attention.dim, indexer.itemsize
    teacher = s * t * h * d + s * indexer.entries * d + 4 * t * h
    flops = 2 * (h * d + indexer.heads * indexer.dim) * indexer.picked
    return Work(flops, teacher + indexer.inputs + 4 * t * indexer.picks)


def index_loss_backward(indexer: Indexer) -> Work:
    """dq and dkeys of the student: reads the indexer's inputs and, per pick, one number; writes three gradients."""
    moved = 2 * indexer.inputs + 8 * indexer.tokens * indexer.picks
    return Work(4 * indexer.heads * indexer.dim * indexer.picked, moved)
