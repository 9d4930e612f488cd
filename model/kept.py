"""Tensors that a cast leaves in float32: norms, mHC, sinks, slot biases, the routers' biases; and ids in whole numbers.

    model.bfloat16(), .half(), .to(dtype), .type(dtype)     a kept tensor is float32, its values as they were
    load_state_dict(..., assign=True)                       float32, whatever is loaded
    model.double()                                          float64, as all others

A module names those of its own tensors in `KEPT`; `kept` is the list of a whole model. In bfloat16 a router's bias near
1 would not move by an update of 0.001, nor a scale of mHC by one of 1e-5; the release has all of them in float32.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = re.compile(r"^parametrizations\.|\.original\d*$|_orig$")  # where torch.nn.utils parametrize and prune put one


class KeepingModule(nn.Module):
    """A module that keeps its tensors `KEPT` from being narrowed."""

    KEPT: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tensors = (*self.named_parameters(), *self.named_buffers())
        own = [tensor for name, tensor in tensors if _HIDDEN.sub("", name) in self.KEPT]
        found = {id(part) for tensor in own for part in (tensor, tensor.grad)}
        return super()._apply(lambda x: wide(fn(x), x) if id(x) in found else fn(x), recurse)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.KEPT:
            if prefix + name in state:
                state[prefix + name] = wide(state[prefix + name], state[prefix + name])
        super()._load_from_state_dict(state, prefix, *rest)


def wide(cast: Tensor, before: Tensor) -> Tensor:
    """`cast` in float32 at least, with the values of `before` where that is; whole numbers stay what they were."""
    dtype = torch.promote_types(cast.dtype, torch.float32) if before.is_floating_point() else before.dtype
    return cast if cast.dtype == dtype else before.to(cast.device, dtype)


def kept(model: nn.Module) -> set[str]:
    """The names of a model's tensors that are kept."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "KEPT", ())
        if name in module._parameters or name in module._buffers
    }
