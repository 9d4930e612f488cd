"""Tokenizer compression for Engram: tokens whose text differs in case, accents or spacing alone are one (2601.07372).

bytes    A-Z are a-z; space, tab and both line ends are one; every other byte, a piece of a character too, is itself
pairs    by the text that they spell; those that spell pieces of characters are themselves
"""

from torch import Tensor

from ....kernels import compress_vocabulary
from .base import Tokenizer


def canonical_ids(tokenizer: Tokenizer, size: int) -> Tensor:
    """int64 [size]: the class of every id of a model's vocabulary; ids that the tokenizer does not have share one."""
    return compress_vocabulary([tokenizer.decode([token], special=True, continues=True) for token in range(size)])[0]
