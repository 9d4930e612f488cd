"""Contenders from libraries that are no dependencies: transformers, as with `abyssal[test]`, and attn-gym.

They take part where they are installed, are found at run time and never imported otherwise: this file is a comparison,
and the rest of the package does without it.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..roofline import Attention, Hyper, Indexer, MoE
from .task import Contender, NotHere, Run

LIBRARY, GYM = "transformers", "attn_gym"
DISTRIBUTIONS = {LIBRARY: "transformers", GYM: "attn-gym"}
BACKENDS = ("eager", "grouped_mm", "batched_mm")  # those that honour the clamp and have a backward pass


def experts(m: MoE, limit: float) -> list[Contender]:
    """The experts of its DeepSeek-V4 with each backend, on the inputs of `moe_experts`."""
    gathered = 3 * m.rows * m.width * m.expert_width * m.itemsize  # batched_mm copies the weights for every row
    scratch = {"batched_mm": 2 * gathered}  # the copies, and the gradient of one at a time
    makes = {name: functools.partial(_experts, name, m, limit) for name in BACKENDS}
    return [_contender(f"{LIBRARY} {name}", LIBRARY, make, scratch.get(name, 0)) for name, make in makes.items()]


def _experts(backend: str, m: MoE, limit: float) -> Run:
    config = _config(
        hidden_size=m.width,
        moe_intermediate_size=m.expert_width,
        n_routed_experts=m.experts,
        num_experts_per_tok=m.slots,
        swiglu_limit=limit,
        num_hidden_layers=1,
        experts_implementation=backend,
    )
    with torch.device("meta"):
        module = _modeling().DeepseekV4Experts(config)

    def run(x: Tensor, experts: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        ours = {"gate_up_proj": w13, "down_proj": w2}
        return (torch.func.functional_call(module, ours, (x, experts, weights)),)

    return run


def _modeling() -> Any:
    return importlib.import_module(f"{LIBRARY}.models.deepseek_v4.modeling_deepseek_v4")


def _config(**sizes: Any) -> Any:
    return importlib.import_module(f"{LIBRARY}.models.deepseek_v4").DeepseekV4Config(**sizes)


def _contender(name: str, library: str, make: Callable[[], Run], scratch: int = 0, why_not: str = "") -> Contender:
    """`make` looks into the library, when the contender runs for the first time; what it does not find is NotHere."""
    if not importlib.util.find_spec(library):
        return Contender(name, None, "not installed")

    @functools.cache
    def found() -> Run:
        try:
            return make()
        except Exception as error:  # whatever a foreign import raises
            raise NotHere(f"{library} {_version(library)}: {error!r}".splitlines()[0]) from error

    return Contender(name, lambda *inputs: found()(*inputs), why_not, scratch)


# attention -----------------------------------------------------------------------------------------------------------


def eager_attention(work: Attention, visible: Callable[..., Tensor]) -> Contender:
    """transformers' only attention for this model: every pair, under an additive mask that `visible` gives."""

    def make() -> Run:
        eager = _modeling().eager_attention_forward

        def run(q: Tensor, kv: Tensor, sink: Tensor, compressed: Any = None, index: Any = None) -> tuple[Tensor, ...]:
            hidden = ~visible(work, index, q.device)
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
            keys = (kv if compressed is None else torch.cat([kv, compressed], 1))[:, None]
            layer = SimpleNamespace(num_key_value_groups=work.heads, sinks=sink.to(q.dtype), training=False)
            return (eager(layer, q.transpose(1, 2), keys, keys, mask, scaling=work.dim**-0.5)[0],)

        return run

    scores = work.heads * work.tokens * (work.tokens + work.entries) * work.itemsize
    return _contender(f"{LIBRARY} eager", LIBRARY, make, scratch=6 * scores)


def gather_attention(work: Attention, fused: bool) -> Contender:
    """attn-gym's `gather_attn`: its fused kernels on a GPU. HCA as a list of every entry that a query sees."""

    def make() -> Run:
        gather_attn = importlib.import_module(f"{GYM}.sparse").gather_attn
        given = {"sliding_window_size": work.window, "scale": work.dim**-0.5, "impl": "fused" if fused else "reference"}

        def run(q: Tensor, kv: Tensor, sink: Tensor, compressed: Any = None, index: Any = None) -> tuple[Tensor, ...]:
            entries = kv[:, :0] if compressed is None else compressed
            if index is None:
                index = torch.arange(entries.shape[1], dtype=torch.int32, device=q.device).expand(1, work.tokens, -1)
                seen = torch.arange(1, work.tokens + 1, device=q.device)[:, None] // max(work.ratio, 1)
                index = torch.where(index < seen, index, -1)
            out = gather_attn(q.transpose(1, 2), kv[:, None], entries[:, None], index, sink, **given)
            return (out.transpose(1, 2),)

        return run

    dense = work.heads * work.tokens * (work.tokens + work.entries) * 4
    return _contender("attn-gym", GYM, make, scratch=0 if fused else 6 * dense)


# indexer -------------------------------------------------------------------------------------------------------------


def eager_indexer(work: Indexer) -> Contender:
    """transformers' scorer, and the choice that its indexer makes of the scores: every score in memory."""

    def make() -> Run:
        config = _config(index_n_heads=work.heads, index_head_dim=work.dim, hidden_size=work.heads, num_hidden_layers=1)
        scorer = _modeling().DeepseekV4IndexerScorer(config)
        scorer.weights_proj = torch.nn.Identity()  # our weights are projected, and scaled
        scale = scorer.softmax_scale * scorer.weights_scaling

        def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            scores = scorer(q, keys, weights.float() / scale)
            seen = torch.arange(1, work.tokens + 1, device=q.device)[:, None] // work.ratio
            future = torch.arange(work.entries, device=q.device) >= seen
            picks = scores.masked_fill(future, float("-inf")).topk(min(work.picks, work.entries), -1).indices
            return (torch.where(picks >= seen, -1, picks),)

        return run

    return _contender(f"{LIBRARY} eager", LIBRARY, make, scratch=12 * work.tokens * work.heads * work.entries)


def gym_indexer(work: Indexer, fused: bool) -> Contender:
    """attn-gym's `lightning_indexer`: its fused kernels on a GPU."""

    def make() -> Run:
        indexer = importlib.import_module(f"{GYM}.sparse").lightning_indexer
        given = {"causal": True, "compress_ratio": work.ratio, "impl": "fused" if fused else "reference"}

        def run(q: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
            return (indexer(q, keys, weights, min(work.picks, work.entries), **given).long(),)

        return run

    scores = 4 * work.tokens * work.heads * work.entries
    return _contender("attn-gym", GYM, make, scratch=0 if fused else 3 * scores)


# streams -------------------------------------------------------------------------------------------------------------


def hyper_connection(work: Hyper) -> Contender:
    """transformers' mHC module and the lines of its decoder layer that write a sublayer's output back."""

    def make() -> Run:
        config = _config(hidden_size=work.width, hc_mult=work.streams, num_hidden_layers=1)
        with torch.device("meta"):
            module = _modeling().DeepseekV4HyperConnection(config)

        def run(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
            ours = {"fn": fn, "base": base, "scale": scale}
            post, comb, collapsed = torch.func.functional_call(module, ours, (streams,))
            post, comb = post.to(streams.dtype), comb.to(streams.dtype)
            return (post.unsqueeze(-1) * collapsed.unsqueeze(-2) + torch.matmul(comb.mT, streams),)

        return run

    return _contender(LIBRARY, LIBRARY, make)


def versions() -> dict[str, str]:
    return {name: _version(library) for library, name in DISTRIBUTIONS.items()}


def _version(library: str) -> str:
    try:
        return metadata.version(DISTRIBUTIONS[library]) if importlib.util.find_spec(library) else "not installed"
    except metadata.PackageNotFoundError:
        return "of unknown version"
