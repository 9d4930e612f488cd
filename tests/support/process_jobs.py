"""Two processes over gloo that do one job after another, so that torch is imported in them once.

results = together([Job("name", training, {...}), ...], folder)        results["name"][rank]
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2


class Job(NamedTuple):
    name: str
    do: Callable[..., Any]
    arguments: dict[str, Any]


def together(jobs: Sequence[Job], folder: Path) -> dict[str, list[Any]]:
    """What each job gave in each process; an error that it raised counts as its result."""
    folder.mkdir()
    mp.spawn(_work, (list(jobs), folder), nprocs=SIZE)
    return {
        job.name: [torch.load(folder / f"{job.name}-{rank}", weights_only=False) for rank in range(SIZE)]
        for job in jobs
    }


def _work(rank: int, jobs: list[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.pop("WORLD_SIZE", None)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=300))
    for job in jobs:
        try:
            result = job.do(**job.arguments)
        except (ValueError, ArithmeticError) as error:
            result = error
        torch.save(result, folder / f"{job.name}-{rank}")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive their group, and abort where they let go of a tensor while Python ends


def spoiled(model: torch.nn.Module) -> None:
    """Not a number in the experts of the last process."""
    with torch.no_grad():
        model.layers[2].ffn.experts.w2[-1, 0, 0] = torch.nan


def training(recipe: dict[str, Any], out: Path, **options: Any) -> float:
    """A run of that recipe; its held-out score."""
    from abyssal.train.recipe import Recipe
    from abyssal.train.start import train

    return train(Recipe.from_dict(recipe), out, shown=False, **options).scores["held_out"]


def expert_pass(dtype: torch.dtype, only: int | None, tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Forward and backward of experts that two processes share out, each with tokens of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    from abyssal.kernels import Routing
    from abyssal.train.distributed.experts import ParallelExperts

    rank, case = dist.get_rank(), expert_case(dtype, only, tokens)
    module = ParallelExperts(case["experts"], init_device_mesh("cpu", (SIZE,)))
    x, weights, shared = (case[name][rank].requires_grad_() for name in ("x", "weights", "shared"))
    out = module(x, Routing(weights, case["chosen"][rank], weights), shared)
    out.backward(case["dout"][rank])
    grads = {"dw13": module.w13.grad.full_tensor(), "dw2": module.w2.grad.full_tensor()}
    return {"out": out.detach(), "dx": x.grad, "dweights": weights.grad, "dshared": shared.grad, **grads}


def expert_case(dtype: torch.dtype, only: int | None, tokens: tuple[int, ...]) -> dict[str, Any]:
    """Weights of 6 experts and, for each process, inputs; all tokens choose below `only`."""
    from abyssal.model import ModelConfig
    from abyssal.model.moe import Experts

    torch.manual_seed(3)
    changes = {"n_routed_experts": 6, "hidden_size": 32, "moe_intermediate_size": 16, "initializer_range": 0.4}
    config = ModelConfig.from_dict({**ModelConfig.load("nano").to_dict(), **changes})
    case: dict[str, Any] = {"experts": Experts(config).to(dtype), "limit": config.swiglu_limit}
    for name, width in (("x", 32), ("shared", 32), ("dout", 32), ("weights", 2)):
        case[name] = [torch.randn(n, width).to(torch.float32 if name == "weights" else dtype) for n in tokens]
    case["chosen"] = [torch.stack([torch.randperm(only or 6)[:2] for _ in range(n)]) for n in tokens]
    return case


def sums() -> dict[str, Any]:
    """What a world says of itself, and the norm of gradients in parts of every kind."""
    from torch import nn
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from abyssal.train.distributed.shard import clip, gradient_norm
    from abyssal.train.distributed.world import processes

    with processes(torch.device("cpu"), 2) as world:
        torch.manual_seed(0)
        parameters, grads = [], [torch.randn(5, 4), torch.randn(3), torch.randn(2, 2), torch.randn(7)]
        for grad, placement in zip(grads, (Shard(0), Replicate(), None, Shard(0))):
            mesh = world.grid["expert"] if grad.ndim == 1 else world.every
            whole = grad if placement is None else distribute_tensor(grad, mesh, [placement], src_data_rank=None)
            parameters.append(nn.Parameter(torch.zeros_like(whole)))
            parameters[-1].grad = whole
        parts = [parameter.grad for parameter in parameters]
        expected = float(torch.cat([grad.flatten() for grad in grads]).norm())
        norm = gradient_norm(parts, world)
        clip(parts, norm, 0.5)
        clipped = gradient_norm(parts, world)
        clip(parts, clipped, 2.0)
        return {
            "norms": (float(norm), float(clipped), float(gradient_norm(parts, world))),
            "expected": expected,
            "rows": world.share(range(6, 14)),
            "total": world.total(torch.tensor([world.rank, 1])).tolist(),
            "agreed": world.agree(f"said by {world.rank}"),
            "first": world.first,
            "shape": (world.size, world.expert_parallel, tuple(world.grid.shape)),
        }


def odd_share() -> None:
    from abyssal.train.distributed.world import processes

    with processes(torch.device("cpu")) as world:
        world.share(range(5))


def casts(expert_parallel: int, before: bool) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """The dtypes of a model that is shared out and cast to bfloat16, in parts and put together again."""
    from abyssal.model import ModelConfig, Transformer
    from abyssal.train.distributed.shard import shard, whole_model
    from abyssal.train.distributed.world import processes

    with processes(torch.device("cpu"), expert_parallel) as world:
        model = Transformer(ModelConfig.load("nano"))
        for step in (lambda: model.bfloat16(), lambda: shard(model, world))[:: 1 if before else -1]:
            step()
        together = whole_model(model, world).state_dict()
        return {name: (tensor.dtype, together[name].dtype) for name, tensor in model.state_dict().items()}


def odd_experts() -> None:
    from abyssal.train.distributed.world import processes

    with processes(torch.device("cpu"), 3):
        pass
