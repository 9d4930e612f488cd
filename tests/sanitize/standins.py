"""What a GPU does and ttsem 0.1.0 does not stand in for, as little of it as the tests need.

Its function mode sends `device="cuda"` to the CPU, says `cuda` of every tensor and fills new memory with NaN, but only
while the mode is on: not in a backward pass, which therefore gets it here too, nor inside a custom operator.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from ttsem import harness, ops, sanitize


@contextmanager
def standins():
    """To be opened in a ttsem session, whose function mode is the last one on the stack."""
    (*_, mode) = _get_current_function_mode_stack()
    with ExitStack() as stack:
        for name in ("torch.autograd._engine_run_backward", "torch.autograd.graph._engine_run_backward"):
            stack.enter_context(patch(name, _under(mode, torch.autograd.graph._engine_run_backward)))
        stack.enter_context(patch("torch.Tensor.new_empty", _unwritten(torch.Tensor.new_empty)))
        kept = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(patch.dict(kept, default=lambda x: (x.shape, x.dtype)))  # not its device: see above
        stack.enter_context(patch("torch.tensor", _unpinned(torch.tensor)))
        stack.enter_context(patch("torch.mm", _mm(torch.mm)))
        stack.enter_context(patch("torch.addmm", _addmm(torch.addmm)))
        asked = "torch.optim.Optimizer._accelerator_graph_capture_health_check"
        stack.enter_context(patch(asked, lambda optimizer: None))  # what AdamW asks of a stream
        stack.enter_context(patch.object(torch.autocast, "__enter__", _enter))
        stack.enter_context(patch.object(torch.autocast, "__exit__", _exit))
        stack.enter_context(patch.dict(ops.OPS, {"tt.descriptor_load": _load(ops.OPS["tt.descriptor_load"])}))
        stack.enter_context(patch.object(sanitize, "_write_back", _written(sanitize._write_back)))
        yield


def _under(mode: Any, run_backward: Any) -> Any:
    """A backward pass in which tensors are on the pretend device too: checkpoints recompute there."""

    def run(*arguments: Any, **options: Any) -> Any:
        with mode:
            return run_backward(*arguments, **options)

    return run


def _unwritten(stock: Any) -> Any:
    """New memory holds NaN, or an absurd id: what operators allocate, all of it by `new_empty`."""

    def new_empty(x: Tensor, *shape: Any, **options: Any) -> Tensor:
        out = stock(x, *shape, **options)
        return out.fill_(float("nan") if out.is_floating_point() else 10**6 if out.itemsize > 1 else 0xA5)

    return new_empty


def _unpinned(stock: Any) -> Any:
    """Only a driver pins memory."""
    return lambda *arguments, pin_memory=False, **options: stock(*arguments, **options)


def _mm(stock: Any) -> Any:
    """`out_dtype`, sums of half precisions in float32, is CUDA's; products of halves are exact in float32. oneDNN's AMX
    kernels multiply what lies behind the rows of a view by zero, be it NaN.
    """

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return stock(*(x.to(out_dtype or x.dtype).contiguous() for x in (a, b)), **options)

    return mm


def _addmm(stock: Any) -> Any:
    def addmm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        cast = [a, b] if out_dtype is None else [a.to(out_dtype), b.to(out_dtype)]
        return stock(x, *cast, **options)

    return addmm


_stock_enter, _stock_exit = torch.autocast.__enter__, torch.autocast.__exit__


def _enter(self: Any) -> Any:
    """CUDA's autocast takes the CPU's with it, as that is where the tensors are."""
    if self.device == "cuda":
        self.twin = torch.autocast("cpu", self.fast_dtype, self._enabled, self._cache_enabled)
        _stock_enter(self.twin)
    return _stock_enter(self)


def _exit(self: Any, *exception: Any) -> Any:
    result = _stock_exit(self, *exception)
    if self.device == "cuda":
        _stock_exit(self.twin, *exception)
    return result


def _load(stock: Any) -> Any:
    """A load through a descriptor may drop the block's first dimensions of length one."""

    def load(interp: Any, op: Any, args: Any) -> Any:
        (block,) = stock(interp, op, args)
        return [block.reshape(ops._rty(op).shape)]

    return load


def _written(stock: Any) -> Any:
    """What a kernel has stored through a descriptor is to be found in its tensor."""

    def write_back(record: Any, execution: Any) -> None:
        bound = {name: x.base if harness._is_descriptor(x) else x for name, x in record.bound.items()}
        stock(replace(record, bound=bound), execution)

    return write_back
