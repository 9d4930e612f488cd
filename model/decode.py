"""One token of one sequence on a CPU: the layers once more, in numpy.

A token is a hundred small products per layer, and what they cost is their calls: numpy's are several times cheaper than
torch's. `Transformer` takes this path by itself where it applies (`decoder`); it computes what `Block` computes, reads
the same parameters where they lie, and writes to the same cache.

The layers stand here a second time, so that an edit of theirs must be made here too. Whether it has been is looked at,
not believed (`decode`): tokens that do something for the first time are computed by the modules as well, on the same
cache. Where they differ by more than rounding, the modules' result is taken, and from then on the modules.

n streams · d width · h heads · c head dim · m compression ratio · g output groups · r their rank
"""

import math
import os
import sys
import warnings
from collections.abc import Callable
from itertools import chain
from operator import is_, itemgetter
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.attention.step import attention_step
from ..kernels.hyper.step import HyperSite, hyper_head_step, hyper_recombine_step, hyper_step
from ..kernels.index_topk.step import index_topk_step
from ..kernels.moe_experts.step import moe_experts_step, swiglu_step
from ..kernels.moe_route.step import moe_route_step
from ..kernels.norm_rope.step import head_norm_step, rms_norm_step, rope_rotation_step, rope_step
from ..kernels.pool.step import pool_step
from ..kernels.watch import is_watched, told
from .attention import Attention
from .block import Block
from .cache import Cache, CompressorCache, LayerCache, Step, Undo, continue_layout
from .compressor import Compressor, ExactLinear
from .engram import Engram
from .hyper import HyperConnection, HyperHead
from .indexer import Indexer
from .kinds import SPARSE
from .moe import Experts, Gate, MoE, SharedExpert
from .mtp import MTP
from .norm import RMSNorm
from .rotary import frequencies
from .storage import CodedStep
from .tables import RowTable, Table

EVERY = slice(None)
TOLERANCE = 1e-4  # of a tensor's largest value; float32 rounds 3e-6 at most in models of 5 to 20 layers
SMALLEST = 1e-12  # largest value that counts as one
CHANCES = 3  # differences in a row that make a verdict where near ties may fall either way: picks, stored codes
ANYHOW = 997  # tokens from one look to the next where nothing new is done
MOST = 2  # tokens of a call up to which one after the other is faster than torch with all at once
PLAIN = (
    *(Attention, Block, Compressor, Engram, HyperConnection, HyperHead, Indexer, Experts, Gate, MoE, SharedExpert, MTP),
    *(RMSNorm, RowTable, Table, nn.Linear, ExactLinear, nn.Embedding, nn.ModuleList),
)
Pass = tuple[Tensor, Tensor]  # hidden states [1, t, d] and streams [1, t, n, d]
DIFFERS = (
    "decoding in numpy (model/decode.py) and the model's modules differ by {apart:.1e} of the largest value at "
    "position {position}, as where one has been edited and the other has not. From now on this model decodes by its "
    "modules; what a cache holds of tokens that came one by one is still numpy's: read the text anew. Carry the edit "
    "over to model/decode.py or kernels/*/step.py, or set model.fast_decode = False or ABYSSAL_FAST_DECODE=0."
)
FORWARD = {kind: kind.forward for kind in PLAIN}
BUILT_IN = {*vars(nn.Module()), "counts", "fast_decode", "recompute"}  # tell nothing of what a module computes


class Rotations:
    """RoPE at one position, of the two bases."""

    def __init__(self, config: Any, position: int) -> None:
        self.config, self.position = config, position
        self._found: dict[tuple[bool, int], np.ndarray] = {}

    def of(self, layer: int, position: int | None = None) -> np.ndarray:
        """Of the token, or of another position, in a layer's base."""
        position = self.position if position is None else position
        key = self.config.compress_ratio(layer) > 0, position
        if key not in self._found:
            self._found[key] = rope_rotation_step(position, frequencies(self.config, layer).numpy())
        return self._found[key]


class CompressorStep:
    """`Compressor` for one token: x [d] to all entries so far [p, c], coded ones as `CodedStep`."""

    def __init__(self, module: Compressor) -> None:
        self.config, self.layer, self.ratio, self.overlap = module.config, module.layer, module.ratio, module.overlap
        self.wkv, self.wgate, self.ape = map(view, (module.wkv.weight, module.wgate.weight, module.ape))
        self.norm, self.eps = view(module.norm.weight), module.norm.eps

    def __call__(self, x: np.ndarray, rotations: Rotations, cache: CompressorCache) -> Any:
        rows = cache.tail.push(np.concatenate((self.wkv.dot(x), self.wgate.dot(x))), rotations.position)
        seen = (rotations.position + 1) // self.ratio
        if (rotations.position + 1) % self.ratio == 0:
            half = rows.shape[1] // 2
            entry = pool_step(rows[:, :half], rows[:, half:], self.ape, self.overlap)
            entry = rms_norm_step(entry, self.norm, self.eps)
            rope_step(entry, rotations.of(self.layer, (seen - 1) * self.ratio))
            cache.store.put(seen - 1, entry)
        return cache.store.first(seen)


class IndexerStep:
    """`Indexer` and `index_topk` for one token: the picks [k], None for all."""

    def __init__(self, module: Indexer, picks: int) -> None:
        self.shape, self.picks = (module.heads, module.head_dim), picks
        self.wq_b, self.weights_proj = view(module.wq_b.weight), view(module.weights_proj.weight)
        self.layer = module.compressor.layer
        self.compressor = told(CompressorStep(module.compressor), module.compressor)
        self.topk = told(index_topk_step, "index_topk")

    def __call__(
        self, x: np.ndarray, q_latent: np.ndarray, rotations: Rotations, cache: CompressorCache
    ) -> np.ndarray | None:
        keys = self.compressor(x, rotations, cache)
        if len(keys) <= self.picks:
            return None
        q = self.wq_b.dot(q_latent).reshape(self.shape)
        rope_step(q, rotations.of(self.layer))
        if isinstance(keys, CodedStep):
            q = keys.format.rotate_step(q)
        weights = self.weights_proj.dot(x)
        weights *= (self.shape[0] * self.shape[1]) ** -0.5
        return self.topk(q, weights, keys, self.picks)


class AttentionStep:
    """`Attention` for one token, x [d] to [d]."""

    def __init__(self, module: Attention) -> None:
        c = module.config
        self.layer, self.shape, self.eps = module.layer, (c.num_attention_heads, c.head_dim), c.rms_norm_eps
        self.q_eps, self.kv_eps = module.q_norm.eps, module.kv_norm.eps
        self.wq_a, self.wq_b, self.wkv = (view(x.weight) for x in (module.wq_a, module.wq_b, module.wkv))
        self.q_norm, self.kv_norm = view(module.q_norm.weight), view(module.kv_norm.weight)
        self.wo_a = view(module.wo_a.weight).reshape(c.o_groups, c.o_lora_rank, -1)
        self.wo_b, self.sink = view(module.wo_b.weight), view(module.attn_sink)[:, None]
        self.attend = told(attention_step, "attention")
        self.compressor = told(CompressorStep(module.compressor), module.compressor) if module.ratio else None
        sparse = module.kind == SPARSE
        self.indexer = told(IndexerStep(module.indexer, c.index_topk), module.indexer) if sparse else None

    def __call__(self, x: np.ndarray, rotations: Rotations, cache: LayerCache) -> np.ndarray:
        rotation = rotations.of(self.layer)
        q_latent = rms_norm_step(self.wq_a.dot(x), self.q_norm, self.q_eps)
        q = head_norm_step(self.wq_b.dot(q_latent).reshape(self.shape), self.eps)
        kv = rms_norm_step(self.wkv.dot(x), self.kv_norm, self.kv_eps)
        rope_step(q, rotation)
        rope_step(kv, rotation)
        keys = [cache.window.push(kv, rotations.position)]
        if self.compressor is not None and cache.compressor is not None:
            entries, picks = self.compressor(x, rotations, cache.compressor), None
            if self.indexer is not None and cache.indexer is not None:
                picks = self.indexer(x, q_latent, rotations, cache.indexer)
            keys.append(entries[EVERY if picks is None else picks])
        out = self.attend(q, keys, self.sink, self.shape[1] ** -0.5)
        rope_step(out, rotation.conj())
        return self._project(out)

    def _project(self, out: np.ndarray) -> np.ndarray:
        z = np.empty(self.wo_a.shape[:2], out.dtype)
        for low_rank, heads, row in zip(self.wo_a, out.reshape(len(z), -1), z):
            low_rank.dot(heads, row)
        return self.wo_b.dot(z.reshape(-1))


class MoEStep:
    """`MoE` for one token, x [d] to [d]."""

    def __init__(self, module: MoE) -> None:
        c, gate = module.gate.config, module.gate
        self.scale, self.top_k = c.routed_scaling_factor, c.num_experts_per_tok
        self.limit, self.shared_limit = module.experts.limit, module.shared_experts.limit
        self.gate = view(gate.weight)
        self.bias = None if gate.is_hash else view(gate.bias)
        self.table = view(gate.tid2eid) if gate.is_hash else None
        self.w13, self.w2 = view(module.experts.w13), view(module.experts.w2)
        self.shared13, self.shared2 = view(module.shared_experts.w13.weight), view(module.shared_experts.w2.weight)
        self.routed, self.shared = told(moe_experts_step, module.experts), told(shared_expert, module.shared_experts)

    def __call__(self, x: np.ndarray, token: int) -> np.ndarray:
        given = None if self.table is None else self.table[token]
        experts, weights = moe_route_step(self.gate.dot(x), self.scale, self.top_k, self.bias, given)
        out = self.routed(x, experts, weights, self.w13, self.w2, self.limit)
        out += self.shared(x, self.shared13, self.shared2, self.shared_limit)
        return out


class BlockStep:
    """`Block` for one token, streams [n, d] to streams."""

    def __init__(self, module: Block) -> None:
        self.engram, self.memory = module.engram, told(memory, module.engram)
        self.hc_attn, self.hc_ffn = site(module.hc_attn), site(module.hc_ffn)
        self.attn_norm, self.ffn_norm = view(module.attn_norm.weight), view(module.ffn_norm.weight)
        self.attn_eps, self.ffn_eps = module.attn_norm.eps, module.ffn_norm.eps
        self.read_attn, self.read_ffn = told(hyper_step, module.hc_attn), told(hyper_step, module.hc_ffn)
        self.norm_attn, self.norm_ffn = told(rms_norm_step, module.attn_norm), told(rms_norm_step, module.ffn_norm)
        self.recombine = told(hyper_recombine_step, "hyper_recombine")
        self.attn, self.ffn = told(AttentionStep(module.attn), module.attn), told(MoEStep(module.ffn), module.ffn)

    def __call__(self, streams: np.ndarray, token: int, rotations: Rotations, cache: LayerCache) -> np.ndarray:
        if self.engram is not None:
            streams = streams + self.memory(self.engram, streams, token, rotations.position, cache)
        u, post, comb = self.read_attn(streams, self.hc_attn)
        y = self.attn(self.norm_attn(u, self.attn_norm, self.attn_eps), rotations, cache)
        streams = self.recombine(y, streams, post, comb)
        u, post, comb = self.read_ffn(streams, self.hc_ffn)
        y = self.ffn(self.norm_ffn(u, self.ffn_norm, self.ffn_eps), token)
        return self.recombine(y, streams, post, comb)


class Decoder:
    """The numpy twin of a `Transformer`'s layers."""

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.embed = view(model.embed.weight)
        self.layers = [told(BlockStep(block), block) for block in model.layers]
        self.head, self.norm, self.eps = site(model.hc_head), view(model.norm.weight), model.norm.eps
        self.collapse, self.norm_head = told(hyper_head_step, model.hc_head), told(rms_norm_step, model.norm)

    def __call__(self, tokens: list[int], past: int, caches: list[LayerCache]) -> Pass:
        """Hidden states [1, t, d] and streams [1, t, n, d] of the tokens, which are appended to the caches."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            found = [self._token(token, past + i, caches) for i, token in enumerate(tokens)]
        hidden, streams = (torch.from_numpy(np.stack(part)[None]) for part in zip(*found))
        return hidden, streams

    def _token(self, token: int, position: int, caches: list[LayerCache]) -> tuple[np.ndarray, np.ndarray]:
        streams = np.tile(self.embed[token], (self.config.hc_mult, 1))
        rotations = Rotations(self.config, position)
        for layer, cache in zip(self.layers, caches):
            streams = layer(streams, token, rotations, cache)
        return self.norm_head(self.collapse(streams, self.head), self.norm, self.eps), streams


class Source:
    """A model's decoder and what it was made from, to tell whether it still holds. The model itself is not held."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())[1:]
        self.own = [vars(m) for m in (model, *self.modules)]
        self.hooks = [own[name] for own in self.own[1:] for name in ("_forward_hooks", "_forward_pre_hooks")]
        self.parts = [(own["_modules"], dict(own["_modules"])) for own in self.own if own["_modules"]]
        self.holders = [own[kind] for own in self.own[1:] for kind in ("_parameters", "_buffers") if own[kind]]
        self.places = places(model)
        self.functions = [x for place, values in self.places for x in values(place) if isinstance(x, FunctionType)]
        self.numbers, self.things = self._numbers(), self._things()
        self.suits = (
            model.config.quantization_aware is None
            and all(map(is_plain_tensor, model.parameters()))
            and not any(isinstance(m, nn.Linear) and m.bias is not None for m in self.modules)
            and not any("forward" in own for own in self.own[1:])
            and not any(own.get(name) is not None for own in self.own[1:] for name in ("replayed", "recorded"))
            and not any(own.get("stage", "sparse") != "sparse" for own in self.own)
        )
        self.decoders: dict[bool, Decoder] = {}  # whether its parts are `told`, for when somebody watches

    def holds(self) -> bool:
        """Whether modules, tensors, where these lie, attributes and functions are still those that they were."""
        try:
            return (
                all(now == then for now, then in self.parts)
                and self._numbers() == self.numbers
                and all(map(is_, self._things(), self.things))
            )
        except KeyError:  # an attribute that is no more
            return False

    def is_plain(self) -> bool:
        """Whether every module computes what its class here says: no subclass, no hook, no other forward pass, the
        sparse stage of attention, experts and entries that it chooses itself and nobody notes."""
        return (
            self.suits
            and not nn.modules.module._has_any_global_hook()
            and {type(m) for m in self.modules} <= FORWARD.keys()
            and all(kind.forward is forward for kind, forward in FORWARD.items())
            and not any(self.hooks)
        )

    def _numbers(self) -> list[int]:
        """Which tensors there are, where they lie, how many attributes each module has."""
        tensors = [x for holder in self.holders for x in holder.values() if x is not None]
        return [*map(id, tensors), *map(Tensor.data_ptr, tensors), *map(len, self.own)]

    def _things(self) -> list[Any]:
        """Attributes and functions, and the code of these: a notebook that reloads a file puts it into the old ones."""
        found = chain.from_iterable([values(place) for place, values in self.places])
        return [*found, *[x.__code__ for x in self.functions]]


class Trust:
    """What a model's decoder has been seen to do as the modules do."""

    def __init__(self) -> None:
        self.proven: set[tuple[Any, ...]] = set()
        self.unseen = 0  # tokens since the last look
        self.doubts = 0
        self.lost = False

    def judge(self, apart: float, step: Step, chances: int) -> bool:
        """Whether both agree; at the last of the `chances` to do so in a row, the verdict."""
        self.doubts = self.doubts + 1 if apart > TOLERANCE else 0
        if self.doubts >= chances and not self.lost:
            self.lost = True
            warnings.warn(DIFFERS.format(apart=apart, position=step.past[0]), RuntimeWarning, stacklevel=8)
        return not self.doubts


_sources: WeakKeyDictionary[nn.Module, Source] = WeakKeyDictionary()
_trust: WeakKeyDictionary[nn.Module, Trust] = WeakKeyDictionary()


def decode(model: nn.Module, ids: Tensor, step: Step, cache: Cache, in_torch: Callable[[], Pass]) -> Pass | None:
    """A step in numpy, appended to the cache; None, and the cache as it was, where the modules are to compute it.

    in_torch: computes the step by the modules, which append to the layers' caches.
    """
    layers = decoder(model, step) if cache.dtype == torch.float32 else None
    if layers is None:
        return None
    trust, doings = _trust[model], what_it_does(model.config, step, cache.storage)
    trust.unseen += step.columns
    want: list[Tensor] = []
    if not is_watched() and (trust.unseen > ANYHOW or not doings <= trust.proven):
        with cache.appending(step):
            want = [*in_torch(), *written(cache, step)]
            raise Undo
    found = None
    with cache.appending(step):
        found = layers(ids[0].tolist(), step.past[0], cache.layers)
        if want:
            apart = max(map(difference, [*found, *written(cache, step)], want))
            near_ties = cache.storage != "exact" or any("choice" in doing for doing in doings)
            if not trust.judge(apart, step, CHANCES if near_ties else 1):
                found = None
                raise Undo
            trust.proven |= doings
            trust.unseen = 0
    return found


def what_it_does(config: Any, step: Step, storage: str) -> set[tuple[Any, ...]]:
    """What a step makes the layers do that not every step does: positions twice as far, a full window, a ratio's first
    entry or one with a window before it, a choice that leaves 1, 2, 4 or 8 entries out.
    """
    before, after = step.past[0], step.past[0] + step.columns
    doings: set[tuple[Any, ...]] = {("position", after.bit_length()), ("window", after > config.sliding_window)}
    for kind, ratio in {*zip(config.layer_types, config.compress_ratios)}:
        if ratio and after // ratio > before // ratio:
            doings.add(("entry", ratio, after // ratio > 1))
        if kind == SPARSE and (left_out := after // ratio - config.index_topk) > 0:
            doings.add(("choice", ratio, min(left_out.bit_length(), 4)))
    return {(storage, *doing) for doing in doings}


def written(cache: Cache, step: Step) -> list[Tensor]:
    return [rows for layer in cache.layers for rows in layer.appended(step)]


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; what is not finite equals itself alone."""
    if a.shape != b.shape:
        return math.inf
    apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(math.inf)
    return float(apart.max() / b.abs().nan_to_num(0, 0, 0).max().clamp_min(SMALLEST)) if a.numel() else 0.0


def decoder(model: nn.Module, step: Step) -> Decoder | None:
    """The decoder for a call, if it is one of at most `MOST` tokens of one sequence, nobody wants otherwise
    (`fast_decode`, the definitions), and the model is plain float32 on a CPU, rounds nothing (`quantization_aware`) and
    has not been caught.
    """
    if len(step.past) > 1 or not 1 <= step.columns <= MOST or not step.even:
        return None
    if not model.fast_decode or os.environ.get("ABYSSAL_FAST_DECODE") == "0":
        return None
    if os.environ.get("ABYSSAL_BACKEND") == "reference":
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    trust = _trust.setdefault(model, Trust())
    if trust.lost:
        return None
    source = _sources.get(model)
    if source is None or not source.holds():
        source = _sources[model] = Source(model)
        trust.proven.clear()
    if not source.is_plain():
        return None
    if is_watched() not in source.decoders:
        source.decoders[is_watched()] = Decoder(model)
    return source.decoders[is_watched()]


def places(model: nn.Module) -> list[tuple[Any, Callable[[Any], tuple[Any, ...]]]]:
    """Where it is said what the modules compute, and how to get at it: their attributes, the methods of their classes,
    the functions that their files name."""
    own = [m for m in model.modules() if not type(m).__module__.startswith("torch.")]
    files = [vars(sys.modules[name]) for name in {type(m).__module__ for m in own}]
    code = [*map(vars, {type(m) for m in own}), *files]
    named = [(vars(m), list(vars(m).keys() - BUILT_IN)) for m in own]
    named += [(place, [name for name, x in place.items() if isinstance(x, FunctionType)]) for place in code]
    return [(place, itemgetter(names[0], *names)) for place, names in named if names]


def is_plain_tensor(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32


def view(x: Tensor) -> np.ndarray:
    """The tensor's own memory."""
    return x.detach().numpy()


def site(module: HyperConnection | HyperHead) -> HyperSite:
    rounds = module.iterations if isinstance(module, HyperConnection) else 0
    return HyperSite(view(module.fn), view(module.base), view(module.scale), module.eps, module.norm_eps, rounds)


def shared_expert(x: np.ndarray, w13: np.ndarray, w2: np.ndarray, limit: float) -> np.ndarray:
    """`SharedExpert` for one token, x [d] to [d]."""
    return w2.dot(swiglu_step(w13.dot(x), limit))


def memory(engram: Engram, streams: np.ndarray, token: int, position: int, cache: LayerCache) -> np.ndarray:
    """What Engram adds to the streams, in torch as it is."""
    ids = torch.tensor([[token]])
    layout = continue_layout(Step([position], [1], 1), ids.device)
    return engram(torch.from_numpy(streams)[None, None], ids, layout, cache)[0, 0].numpy()
