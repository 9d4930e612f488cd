"""What the mechanisms do, measured on a training step now and then: hooks that stay out of the way otherwise.

    grad_by, update_by    norm of the gradient before clipping, and |w' - w| / |w|, by family of parameters
    sinkhorn     [sites]  largest |row or column sum - 1| of C after its Sinkhorn rounds
    gain         [2]      of the composite P = C_1 C_2 ... of all sites: largest sum that a stream collects (forward),
                          largest sum that a stream hands out (backward); 1 and 1 for doubly stochastic C (mHC 3.1)
    recall       [csa]    share of the attention's own k best entries that the indexer's picks hold
    gate         [engram] mean of Engram's gate;   collisions  [engram] share of the batch's different n-grams that
                          meet another one in their row, mean over orders and heads

Streams are sampled at up to TOKENS tokens of the batch and attention at up to QUERIES queries of each row, evenly
spaced; of several processes, the first one's rows. Nothing here changes a number of the training step.

b batch · t tokens · n streams · h heads · d head dim · p entries · s sampled queries · w window · k picks
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...kernels import engram_gate, engram_hash, engram_multipliers, index_topk, norm_rope, rope
from ...model import Transformer
from ...model.attention import Attention
from ...model.engram import Engram
from ...model.hyper import HyperConnection
from ...model.kinds import SPARSE
from ...model.layout import Layout
from ...model.rotary import token_rotation
from ..distributed.shard import whole

TOKENS, QUERIES = 256, 32
FAMILIES = ("engram", "indexer", "compressor", "gate", "experts", "shared_experts", "attn", "norm", "embed", "head")
UNHASHED = 2**62  # as modulus: n-grams keep their own number


def family(name: str) -> str:
    """The mechanism that a parameter belongs to, from its name: mtp, hyper, or the first of FAMILIES that is in it."""
    words = name.split(".")
    if words[0] == "mtp":
        return "mtp"
    if any(word.startswith("hc_") for word in words):
        return "hyper"
    for known in FAMILIES:
        if known in words or (known == "norm" and any("norm" in word for word in words)):
            return known
    raise ValueError(f"parameter {name!r} belongs to no known mechanism")


class Blind:
    """Looks at nothing: what a step tells its observers, and the observer of a step that is not observed."""

    record: Mapping[str, Any] = MappingProxyType({})

    def watching(self) -> AbstractContextManager[None]:
        """Around the forward pass, of each of the step's passes."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The backward pass from `loss` begins."""

    def gradients(self) -> None:
        """All gradients are there, not yet clipped."""

    def updating(self) -> AbstractContextManager[None]:
        """Around the optimizer's step."""
        return nullcontext()


class Observer(Blind):
    """Measures one step of a model: the forward pass within `watching`, then `gradients`, then around the update."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.record: dict[str, Any] = {}

    @property
    def families(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by mechanism, as they are now: those of a row table are new ones in each step."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            found.setdefault(family(name), []).append(parameter)
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks for the forward pass of this step, whose record is a new one; of micro-batches the last one counts."""
        combs: list[Tensor] = []
        found: dict[str, list[Any]] = {"recall": [], "gate": [], "collisions": []}
        hooks = []
        for block in self.model.layers:
            for connection in (block.hc_attn, block.hc_ffn):
                hooks.append(connection.register_forward_hook(_keep_comb(combs)))
            if block.engram is not None:
                hooks.append(block.engram.register_forward_hook(_measure_engram(found)))
            if block.attn.kind == SPARSE and block.attn.stage == "sparse":
                hooks.append(block.attn.register_forward_hook(_measure_recall(found["recall"])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.record = {name: values for name, values in found.items() if values}
        self.record |= {"sinkhorn": [_rounded(residual(comb)) for comb in combs], "gain": composite_gain(combs)}

    def gradients(self) -> None:
        """Norms of the gradients as they are now."""
        norms = {name: [p.grad for p in ps if p.grad is not None] for name, ps in self.families.items()}
        self.record["grad_by"] = {name: _rounded(_norm(grads)) for name, grads in norms.items() if grads}

    @contextmanager
    @torch.no_grad()
    def updating(self) -> Iterator[None]:
        """The optimizer's step within: how far each family moves, relative to where it was."""
        families = self.families
        before = {name: [p.detach().clone() for p in ps] for name, ps in families.items()}
        yield
        moved = {}
        for name, parameters in families.items():
            size, steps = _norm(before[name]), [p.detach() - old for p, old in zip(parameters, before[name])]
            moved[name] = _rounded(_norm(steps) / max(size, 1e-30))
        self.record["update_by"] = moved


def residual(comb: Tensor) -> float:
    """Largest deviation of a row or column sum of C [..., n, n] from 1."""
    return max(float((comb.sum(axis) - 1).abs().max()) for axis in (-1, -2))


def composite_gain(combs: list[Tensor]) -> list[float]:
    """[forward, backward] of the product of C [s, n, n] over all sites, the largest of the sampled tokens."""
    product = combs[0].double()
    for comb in combs[1:]:
        product = product @ comb.double()
    return [_rounded(float(product.abs().sum(axis).max())) for axis in (-2, -1)]


def _keep_comb(combs: list[Tensor]) -> Any:
    def hook(_: HyperConnection, __: Any, output: Any) -> None:
        comb = output[1].comb.detach().flatten(0, -3)
        combs.append(comb[:: max(1, len(comb) // TOKENS)].float())

    return hook


def _measure_engram(found: dict[str, list[Any]]) -> Any:
    @torch.no_grad()
    def hook(engram: Engram, inputs: tuple[Any, ...], _: Tensor) -> None:
        streams, ids, layout = inputs[:3]
        found["gate"].append(_rounded(float(gates(engram, streams, ids, layout).mean())))
        found["collisions"].append(_rounded(collision_rate(engram, ids, layout)))

    return hook


def gates(engram: Engram, streams: Tensor, ids: Tensor, layout: Layout) -> Tensor:
    """Engram's gate [s, n] at sampled tokens."""
    every = max(1, ids.numel() // TOKENS)
    rows = engram.rows(ids, layout).flatten(0, 1)[::every]
    keys = engram.wkv(engram.table(rows[None])).unflatten(-1, (engram.streams + 1, -1))[:, :, : engram.streams]
    sample = streams.flatten(0, 1)[::every][None]
    ones = torch.ones_like(sample[:, :, 0])
    return engram_gate(sample, keys, ones, engram.h_norm, engram.k_norm, eps=engram.eps)[0, ..., 0]


def collision_rate(engram: Engram, ids: Tensor, layout: Layout) -> float:
    """Of the different n-grams of a batch, the share that has its row with another: 1 - rows / n-grams."""
    memory = engram.memory
    multipliers = torch.as_tensor(engram_multipliers(engram.classes, memory.max_ngram, engram.layer, memory.seed))
    orders = memory.max_ngram - 1
    grams = engram_hash(
        engram.canonical[ids],
        multipliers.to(ids.device),
        torch.full((orders, 1), UNHASHED, device=ids.device),
        torch.zeros(orders, dtype=torch.int64, device=ids.device),
        pad=int(engram.canonical[memory.pad_token_id]),
        start=layout.first_rows(orders),
    )
    real = torch.ones_like(ids, dtype=torch.bool) if layout.real is None else layout.real
    rows = rearrange(engram.rows(ids, layout)[real], "t (o k) -> o k t", o=orders)
    different = [len(gram.unique()) for gram in grams[real].T]
    rates = [1 - len(head.unique()) / count for order, count in zip(rows, different) for head in order]
    return sum(rates) / len(rates)


def _measure_recall(found: list[Any]) -> Any:
    @torch.no_grad()
    def hook(attn: Attention, inputs: tuple[Any, ...], _: Any) -> None:
        value = index_recall(attn, inputs[0], inputs[1])
        found.append(None if value is None else _rounded(value))

    return hook


def index_recall(attn: Attention, x: Tensor, layout: Layout) -> float | None:
    """Of the k entries that the attention reads most, the share among the indexer's k picks; mean over sampled queries
    that see more than k entries, None if none does.

    p_s = sum_h exp(scale <q_h, c_s> - lse_h),   lse over window, entries and sink, as in `index_loss`
    """
    config, k = attn.config, attn.config.index_topk
    turn, q_latent = token_rotation(config, attn.layer, layout), attn.q_norm(attn.wq_a(x))
    q = attn.wq_b(q_latent).unflatten(-1, (config.num_attention_heads, config.head_dim))
    q = norm_rope(q, None, config.rms_norm_eps, turn)
    kv, entries = rope(attn.kv_norm(attn.wkv(x)), turn), attn.compressor.entries(layout)
    compressed, index = attn.compressor(x, layout, None), attn.indexer(x, q_latent, turn, layout, None)
    b, t = x.shape[:2]
    at = torch.linspace(0, t - 1, min(t, QUERIES), device=x.device).long()
    start, end = (bound.expand(b, -1)[:, at] for bound in (entries.start, entries.end))
    slot = torch.arange(compressed.shape[1], device=x.device)
    visible = (slot >= start[..., None]) & (slot < end[..., None])
    p = _read(attn, q[:, at], kv, compressed, visible, layout, at)
    counted = end - start > k
    if not counted.any():
        return None
    picks = index_topk(index.q[:, at], index.weights[:, at], index.keys, k=k, start=start, end=end)
    best = p.masked_fill(~visible, -1).topk(k).indices
    hit = (best[..., None] == picks[..., None, :]).any(-1).float().mean(-1)
    return float(hit[counted].mean())


def _read(
    attn: Attention, q: Tensor, kv: Tensor, compressed: Tensor, visible: Tensor, layout: Layout, at: Tensor
) -> Tensor:
    """What each entry gets of the attention of queries q [b, s, h, d] at rows `at`, heads summed: [b, s, p] float32."""
    scale, w = attn.config.head_dim**-0.5, attn.config.sliding_window
    back = at[:, None] - torch.arange(w, device=q.device)
    first = layout.first_rows(w - 1)
    seen = back >= (0 if first is None else first.expand(len(q), -1)[:, at, None])
    near = torch.einsum("bshd,bswd->bshw", q.float(), kv.float()[:, back.clamp_min(0)]) * scale
    near = near.masked_fill(~seen.expand(len(q), -1, -1)[:, :, None], -torch.inf)
    far = torch.einsum("bshd,bpd->bshp", q.float(), compressed.float()) * scale
    far = far.masked_fill(~visible[:, :, None], -torch.inf)
    sink = attn.attn_sink.float().expand(*q.shape[:3])[..., None]
    lse = torch.cat([near, far, sink], -1).logsumexp(-1, keepdim=True)
    return (far - lse).exp().sum(2)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([whole(torch.linalg.vector_norm(x.detach().float())) for x in tensors]).norm())


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
