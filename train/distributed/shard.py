"""Parameters, gradients and moments in parts: FSDP2, a group for each layer and one for the rest.

    forward     a layer gathers its parameters and lets go of them
    backward    it gathers them again; gradients are summed, and each process keeps its part
    update      each process' part of each parameter; buffers (router biases, hash tables) are whole everywhere

Gradients are sums over the processes, not means: each process divides its losses by counts of the whole batch.
Parameters are gathered in float32, whatever dtype autocast computes in: compressors, routers and the head want them so.

With expert parallelism, a layer's experts are shared out over the `expert` axis, and each share over the `data` axis.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model import Transformer
from ...model.moe import MoE
from ...model.tables import RowTable
from ..optim import Optimizers
from ..optim.adam import AdamW
from .world import World

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float


def shard(model: Transformer, world: World) -> None:
    """Shares out the parameters of a model that has the same weights in every process; nothing in a world of one.

    Every process draws all weights from the recipe's seed before it keeps its part of them.

    Raises:
        ValueError: Engram tables that keep their rows apart, parameters of several dtypes, or experts that cannot be
            shared out.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if any(isinstance(module, RowTable) for module in model.modules()):
        raise ValueError("optim.engram_rows='touched': allowed on one process; on several, all rows learn ('all')")
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"model has parameters in {' and '.join(sorted(dtypes))}: allowed is one dtype, to be shared out"
        )
    apart = _share_experts(model, world)
    for part in _groups(model):
        fully_shard(part, mesh=world.every, ignored_params=apart)
    # the blocks' outputs are views, which nothing changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.unshard()  # once, while all learn: what is gathered keeps the `requires_grad` of this moment
            module.reshard()


def _groups(model: Transformer) -> Iterator[nn.Module]:
    """The modules that gather their parameters together, the whole model last."""
    yield from model.layers
    for mtp in model.mtp:  # entered by `predict`, so that what lies around its block belongs to the whole model
        yield mtp.attn
        yield mtp.ffn
    yield model


def _share_experts(model: Transformer, world: World) -> set[nn.Parameter]:
    """Puts `ParallelExperts` in their places; their parameters, if no group is to gather them."""
    if world.grid is None or world.expert_parallel == 1:
        return set()
    from torch.distributed.fsdp import fully_shard

    from .experts import ParallelExperts

    data, expert = world.grid["data"], world.grid["expert"]
    apart: set[nn.Parameter] = set()
    for module in [module for module in model.modules() if isinstance(module, MoE)]:
        module.experts = ParallelExperts(module.experts, expert)
        if data.size() > 1:
            fully_shard(module.experts, mesh=data)
        else:
            apart.update(module.experts.parameters())
    return apart


@torch.no_grad()
def gradient_norm(grads: Sequence[Tensor], world: World) -> Tensor:
    """The norm of the whole gradient, summed in float64: the same number in every process, and that of one process."""
    total = world.total(torch.stack([_own_square(grad, world) for grad in grads]).sum())
    return total.sqrt().to(grads[0].dtype)


@torch.no_grad()
def clip(grads: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scales gradients so that their whole norm is at most `limit`.

    A norm that is not finite scales nothing: it would spread to gradients that are not to blame for it.
    """
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(grad) for grad in grads], torch.where(norm.isfinite(), share, 1.0))


@torch.no_grad()
def clip_gradients(model: nn.Module, limit: float, world: World) -> Tensor:
    """Clips the whole gradient at `limit` (0 = none); its norm [] before, which nobody waits for."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world.size > 1:
        norm = gradient_norm(grads, world)
    else:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    clip(grads, norm, limit or math.inf)
    return norm


@torch.no_grad()
def keep_gradients(model: nn.Module, sound: Tensor) -> None:
    """Every gradient becomes zero unless `sound`, a bool on the device."""
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    bits = [
        grad.view(BITS[grad.element_size()]) for grad in grads
    ]  # NaN · 0 is NaN, but its bits times 0 are those of 0
    torch._foreach_mul_(bits, sound.to(bits[0].dtype))


@torch.no_grad()
def add_loads(model: Transformer, world: World) -> None:
    """Every router counts the load of all processes, so that its bias moves alike in each."""
    gates = [block.ffn.gate for block in (*model.layers, *model.mtp) if block.ffn.gate.counts is not None]
    if world.size > 1 and gates:
        for gate, counts in zip(gates, world.total(torch.stack([gate.counts for gate in gates]))):
            gate.counts = counts


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if mesh_of(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if mesh_of(tensor) else tensor


def mesh_of(tensor: Any) -> Any:
    """The mesh that a tensor is distributed over; None for one that is whole in this process."""
    return getattr(tensor, "device_mesh", None)


def whole_model(model: Transformer, world: World) -> Transformer:
    """The model in one piece, in every process, for evaluation and text; the model itself in a world of one."""
    if world.size == 1:
        return model
    tensors = {name: whole(tensor.detach()) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy.load_state_dict(tensors, assign=True)
    copy.attention_stage = model.attention_stage
    return copy.train(model.training)


def _own_square(grad: Tensor, world: World) -> Tensor:
    """This process' term of the squared norm; what several processes hold is shared out among them."""
    square = local(grad).double().square().sum()
    mesh = mesh_of(grad)
    if mesh is None:
        return square / world.size
    cut = (mesh.size(dim) for dim, place in enumerate(grad.placements) if not place.is_replicate())
    return square * math.prod(cut) / world.size


def split_by_mesh(optimizer: Optimizers) -> Optimizers:
    """The same, with AdamW's groups cut so that each has parameters of one mesh, as its fused update needs them."""
    for rule in optimizer.optimizers:
        if isinstance(rule, AdamW):
            rule.param_groups = [part for group in rule.param_groups for part in _of_one_mesh(group)]
    return optimizer


def _of_one_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    parts: dict[Any, list[Tensor]] = {}
    for parameter in group["params"]:
        parts.setdefault(mesh_of(parameter), []).append(parameter)
    return [{**group, "params": parameters} for parameters in parts.values()]
