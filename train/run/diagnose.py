"""Who is to blame for a number that is not finite: a weight, a module's output, or a gradient.

The first module is the first whose pass comes to its end, so that an inner one is named before those around it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..distributed.shard import local
from ..distributed.world import ALONE, World


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter or buffer, by name, that holds an infinity or a NaN."""
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if not _finite(tensor)), None)


def bad_gradient(model: nn.Module) -> str | None:
    """The first parameter, by name, whose gradient does."""
    return next((name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)), None)


def bad_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The first module whose output does when `run()` calls the model."""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not all(map(_finite, tensors(output))):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def culprit(model: nn.Module, run: Callable[[], Any], world: World = ALONE) -> str:
    """What to look at, for people; `run()` makes the passes that went wrong once more, backward too."""
    weight = world.heard(bad_weight(model))
    if weight:
        return f"{weight} holds numbers that are not finite"
    module = world.heard(bad_module(model, run))
    if module:
        return f"the first output that is not finite is that of {module}"
    gradient = world.heard(bad_gradient(model))
    if gradient:
        return f"every output is finite; the gradient of {gradient} is not"
    return "every weight, output and gradient is finite"


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(local(tensor.detach()).isfinite().all())
