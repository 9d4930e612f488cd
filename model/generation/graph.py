"""One token of every row as a CUDA graph: what a GPU does for it is recorded once and then repeated by one launch.

    capture   past, ids: fixed places on the device;   logits = model(ids, cache);   past <- past + 1
    repeat    ids <- tokens;  replay;  logits

A decoded token is hundreds of small kernels, and launching them takes the host longer than running them takes the GPU.
All shapes are those of the cache: a layer reads entries up to the end that the device knows, whatever room there is.
The results are those of the same pass without a graph, bit for bit.

b rows · v vocabulary
"""

import torch
from torch import Tensor

from ...kernels import exact_linear
from ..cache import Cache, FixedStep
from ..lineage.config import LineageConfig
from ..transformer import Transformer

WARM_UP = 2  # passes before the capture: libraries make their workspaces, kernels are compiled


class TokenGraph:
    """Logits [b, 1, v] of the next token from the tokens int64 [b] before it, which are appended to `cache`.

    The cache is this graph's alone from here on; its tensors must not be replaced (`reorder`, `truncate`).

    Raises:
        ValueError: the model is not on a GPU, or not of V4.
    """

    def __init__(self, model: Transformer, cache: Cache) -> None:
        check_graph(model)
        device = model.head.weight.device
        self.model, self.cache = model, cache
        cache.fix()
        self.past = cache.lengths.to(device)[:, None].contiguous()
        self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device_of(self.ids):  # streams are those of the current device
            self._warm_up()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # others go on
                self.logits = self._pass()

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits' place is the same in every call.

        Raises:
            ValueError: the cache is full; it is unchanged.
        """
        if int(self.cache.lengths.max()) >= self.cache.max_length:
            raise ValueError(f"the cache holds max_length={self.cache.max_length} tokens: there is no room for another")
        self.ids.copy_(tokens[:, None])
        self._graph.replay()
        self.cache.advance()
        return self.logits

    def _pass(self) -> Tensor:
        hidden, _ = self.model._continue(self.ids, FixedStep(self.past), self.cache, 0)
        self.past += 1
        return exact_linear(hidden, self.model.head.weight)

    def _warm_up(self) -> None:
        """Passes that leave no trace."""
        kept = [(rows, rows.clone()) for layer in self.cache.layers for _, rows in layer.tensors()]
        kept.append((self.past, self.past.clone()))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._pass()
            for rows, before in kept:
                rows.copy_(before)
        torch.cuda.current_stream().wait_stream(stream)


def check_graph(model: Transformer, speculative: bool = False, cache: Cache | None = None) -> None:
    """Raises ValueError where tokens cannot come from a graph."""
    if isinstance(model.config, LineageConfig):
        kind = model.config.model_type
        raise ValueError(f"graph=True: the model is of {kind!r}, allowed is 'deepseek_v4' alone")
    if speculative or cache is not None:
        given = "speculative=True" if speculative else "a cache"
        raise ValueError(f"graph=True together with {given}: a graph has one token a pass, in a cache of its own")
    device = model.head.weight.device
    if device.type != "cuda":
        raise ValueError(f"graph=True: the model is on {device}, allowed is a GPU; leave it out there")
