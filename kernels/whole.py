"""Eager engines as operators that torch.compile sees whole: they go block by block and look at values, untraceably.

    forward     the engine's function, without autograd
    backward    the function again, with autograd, and the gradients through it: one forward pass more
    shapes      those of the op's definition

Only compiled code comes here. An engine that is written in operators already, as Triton's are, does not need it.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import torch
from torch import Tensor

from .precision import accumulation

# What a parameter may be, in the words of an operator's schema; a function with another kind is traced.
_KINDS = {
    **{Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"},
    **{Tensor | None: "Tensor?", int | None: "int?", float | None: "float?"},
}

# Tensors like the results of ops whose definition picks rows by their values.
_LIKE: dict[str, Callable[..., list[Tensor]]] = {
    "moe_experts": lambda x, *rest: [x],
    "cross_entropy": lambda x, weight, *rest: [
        x.new_empty((), dtype=torch.promote_types(accumulation(x), accumulation(weight)))
    ],
}


def whole(package: ModuleType) -> SimpleNamespace:
    """The public functions of an op, `package`, by its eager engine, as operators."""
    engine, definition = (importlib.import_module(f".{name}", package.__name__) for name in ("eager", "reference"))
    found = SimpleNamespace()
    for name, define in vars(definition).items():
        if inspect.isfunction(define) and hasattr(package, name):
            setattr(found, name, _operator(name, getattr(engine, name), define))
    return found


def _operator(name: str, run: Callable[..., Any], define: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(run).parameters.values()
    if any(p.annotation not in _KINDS for p in parameters):
        return run
    given = ", ".join(f"{_KINDS[p.annotation]} {p.name}" for p in parameters)
    form = inspect.signature(run).return_annotation
    results = ", ".join(["Tensor"] * _count(form))
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def call(run: Callable[..., Any], values: Sequence[Any]) -> list[Tensor]:
        plain = len(values) - len(keywords)
        return list(_flat(run(*values[:plain], **dict(zip(keywords, values[plain:])))))

    @torch.library.custom_op(f"abyssal::eager_{name}", mutates_args=(), schema=f"({given}) -> ({results})")
    def forward(*values):
        return _packed(_alone(call(run, values), values))

    @forward.register_fake
    def _(*values):
        like = _LIKE[name](*values) if name in _LIKE else call(define, values)
        return _packed([x.new_empty(x.shape) for x in like])

    returned = f"Tensor?[] grads, bool[] needed, {given}"

    @torch.library.custom_op(f"abyssal::eager_{name}_backward", mutates_args=(), schema=f"({returned}) -> Tensor[]")
    def backward(grads, needed, *values):
        guards = (torch._C._SetExcludeDispatchKeyGuard(key, False) for key in _AUTOGRAD)
        with next(guards), next(guards), torch.enable_grad():
            leaves = [x.detach().requires_grad_() if need else x for x, need in zip(values, needed)]
            known = [(x, grad) for x, grad in zip(call(run, leaves), grads) if grad is not None and x.requires_grad]
            wanted = [leaf for leaf, need in zip(leaves, needed) if need]
            results, upstream = zip(*known) if known else ((), ())
            found = torch.autograd.grad(results, wanted, upstream, allow_unused=True) if known else [None] * len(wanted)
        return _alone([torch.zeros_like(x) if dx is None else dx for x, dx in zip(wanted, found)], [*grads, *values])

    @backward.register_fake
    def _(grads, needed, *values):
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in zip(values, needed) if need]

    def keep(ctx, inputs, output):
        ctx.inputs = inputs

    def gradients(ctx, *grads):
        needed = list(ctx.needs_input_grad)
        found = iter(backward(list(grads), needed, *ctx.inputs))
        return tuple(next(found) if need else None for need in needed)

    forward.register_autograd(gradients, setup_context=keep)
    defaults = {p.name: p.default for p in parameters}
    names = list(defaults)

    def operator(*args, **options):
        values = [*args, *(options.get(name, defaults[name]) for name in names[len(args) :])]
        found = forward(*values)
        return _rebuilt(form, iter([found] if isinstance(found, Tensor) else found))

    return operator


_AUTOGRAD = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)


def _packed(results: list[Tensor]) -> Any:
    return tuple(results) if len(results) > 1 else results[0]


def _alone(results: list[Tensor], values: Sequence[Any]) -> list[Tensor]:
    """As an operator returns them: contiguous, and in memory of their own."""
    taken = {x.untyped_storage().data_ptr() for x in values if isinstance(x, Tensor)}
    own = []
    for x in results:
        x = x.contiguous()
        own.append(x.clone() if x.untyped_storage().data_ptr() in taken else x)
        taken.add(own[-1].untyped_storage().data_ptr())
    return own


def _flat(result: Any) -> Iterator[Tensor]:
    """The tensors of a result: of one, of a tuple, of a tuple in a tuple."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from _flat(part)


def _parts(form: Any) -> tuple[Any, ...]:
    """What a tuple holds, by its type."""
    return tuple(form.__annotations__.values()) if hasattr(form, "_fields") else get_args(form)


def _count(form: Any) -> int:
    return 1 if form is Tensor else sum(map(_count, _parts(form)))


def _rebuilt(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `_flat`."""
    if form is Tensor:
        return next(tensors)
    parts = [_rebuilt(part, tensors) for part in _parts(form)]
    return form(*parts) if hasattr(form, "_fields") else tuple(parts)
