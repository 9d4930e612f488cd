"""Continuing a prompt token by token."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .sampling import check_sampling, sample
from .transformer import Transformer


def generate(
    model: Transformer,
    prompt: Sequence[int] | Tensor,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[int] = (),
    stream: bool = False,
) -> Iterator[int] | list[int]:
    """The tokens that follow the prompt: an iterator if `stream`, a list otherwise.

    Args:
        prompt: token ids, a sequence or a tensor of one row.
        max_new_tokens: how many at most.
        temperature, top_k, top_p, min_p: see `token_probabilities`; temperature 0 is greedy.
        seed: of the drawing; the same seed gives the same tokens. None draws anew.
        stop: token ids that end the text; the one that ends it is given too.
        stream: give each token as soon as it is known.

    Raises:
        ValueError: an empty prompt, more than one row, a negative number of tokens, a sampling setting out of range.
    """
    ids = torch.as_tensor(prompt, dtype=torch.int64)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"prompt has shape {tuple(ids.shape)}: it must be one row of at least one token id")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: allowed are 0 and positive numbers")
    check_sampling(temperature, top_k, top_p, min_p)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    tokens = _tokens(model, ids.to(model.head.weight.device), max_new_tokens, seed, frozenset(stop), settings)
    return tokens if stream else list(tokens)


def _tokens(model, ids, max_new_tokens, seed, stop, settings) -> Iterator[int]:
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, logits_to_keep=1).logits[:, -1]
        token = sample(logits, generator, **settings)
        ids = torch.cat([ids, token[:, None]], 1)
        yield int(token)
        if int(token) in stop:
            return
