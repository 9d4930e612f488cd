"""mHC in Triton, as operators that torch.compile, autograd, checkpointing and CUDA graphs see whole.

`kernels` holds the kernels, `launch` their order and blocks. Between forward and backward live the streams and
n^2 + 2n + 1 numbers per token; logits and Sinkhorn's iterates are worked out again.

t tokens · n streams · d width · m rows of the projection
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import Coefficients
from . import launch

__all__ = [
    "hyper_branch", "hyper_coefficients", "hyper_collapse", "hyper_head_weights", "hyper_read", "hyper_recombine",
]  # fmt: skip


def hyper_coefficients(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    *, iterations: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
) -> Coefficients:  # fmt: skip
    """See `kernels.hyper.hyper_coefficients`."""
    out = launch.Read(*_read(_flat(streams), fn, base, scale, iterations, eps, norm_eps, False))
    return _coefficients(out, streams)


def hyper_read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    *, iterations: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
) -> tuple[Tensor, Coefficients]:  # fmt: skip
    """See `kernels.hyper.hyper_read`."""
    return hyper_branch(streams, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)[:2]


def hyper_branch(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    *, iterations: int = 20, eps: float = 1e-6, norm_eps: float = 1e-6,
) -> tuple[Tensor, Coefficients, Tensor]:  # fmt: skip
    """See `kernels.hyper.hyper_branch`."""
    out = launch.Read(*_read(_flat(streams), fn, base, scale, iterations, eps, norm_eps, True))
    u = out.u.view(*streams.shape[:-2], streams.shape[-1])
    passing = _Passing.apply(streams, out.link.view(streams.shape)) if out.link.requires_grad else streams
    return u, _coefficients(out, streams), passing


def hyper_head_weights(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float = 1e-6, norm_eps: float = 1e-6
) -> Tensor:
    """See `kernels.hyper.hyper_head_weights`."""
    out = launch.Read(*_read(_flat(streams), fn, base, scale, 0, eps, norm_eps, False))
    return out.pre.view(streams.shape[:-1])


def hyper_collapse(streams: Tensor, pre: Tensor) -> Tensor:
    """See `kernels.hyper.hyper_collapse`."""
    n, d = streams.shape[-2:]
    return _collapse(_flat(streams), pre.reshape(streams.shape[:-2].numel(), n)).view(*streams.shape[:-2], d)


def hyper_recombine(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `kernels.hyper.hyper_recombine`."""
    t, (n, d) = streams.shape[:-2].numel(), streams.shape[-2:]
    mixed = _recombine(output.reshape(t, d), _flat(streams), post.reshape(t, n), comb.reshape(t, n, n))
    return mixed.view(streams.shape)


def _flat(streams: Tensor) -> Tensor:
    return streams.reshape(streams.shape[:-2].numel(), *streams.shape[-2:])


def _coefficients(out: launch.Read, streams: Tensor) -> Coefficients:
    shape = streams.shape[:-1]
    return Coefficients(out.pre.view(shape), out.post.view(shape), out.comb.view(*shape, shape[-1]))


# projection, coefficients and collapse -------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::hyper_read", mutates_args=())
def _read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    iterations: int, eps: float, norm_eps: float, collapsed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.read(launch.Site(streams, fn, base, scale, iterations, eps), norm_eps, collapsed)


@_read.register_fake
def _(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    iterations: int, eps: float, norm_eps: float, collapsed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch.read_outputs(streams, fn, iterations, collapsed)


@torch.library.custom_op("abyssal::hyper_read_backward", mutates_args=())
def _read_backward(
    du: Tensor | None, dpre: Tensor | None, dpost: Tensor | None, dcomb: Tensor | None, rest: Tensor | None,
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, pre: Tensor, mix: Tensor, r: Tensor,
    iterations: int, eps: float, need_streams: bool, need_fn: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    upstream = launch.Upstream(du, dpre, dpost, dcomb, rest)
    site = launch.Site(streams, fn, base, scale, iterations, eps)
    found = launch.read_backward(upstream, site, launch.Saved(pre, mix, r), need_streams=need_streams, need_fn=need_fn)
    dstreams, dfn = (x.new_empty(0) if dx is None else dx for x, dx in zip((streams, fn), found))
    return dstreams, dfn, found.logits


@_read_backward.register_fake
def _(
    du: Tensor | None, dpre: Tensor | None, dpost: Tensor | None, dcomb: Tensor | None, rest: Tensor | None,
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, pre: Tensor, mix: Tensor, r: Tensor,
    iterations: int, eps: float, need_streams: bool, need_fn: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dstreams, dfn = (x.new_empty(x.shape if need else (0,)) for x, need in ((streams, need_streams), (fn, need_fn)))
    return dstreams, dfn, mix.new_empty(len(fn) + 3)


def _keep_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    streams, fn, base, scale, ctx.iterations, ctx.eps, _, ctx.collapsed = inputs
    _, pre, _, _, mix, r, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(streams, fn, base, scale, pre, mix, r)


def _read_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    du, dpre, dpost, dcomb, _, _, rest = grads
    upstream = du if ctx.collapsed else None, dpre, dpost, dcomb, rest
    if all(grad is None for grad in upstream):
        return (None,) * 8
    needs = ctx.needs_input_grad
    _, _, base, scale, *_ = saved = ctx.saved_tensors
    dstreams, dfn, dlogits = _read_backward(*upstream, *saved, ctx.iterations, ctx.eps, needs[0], needs[1])
    dbase, dscale = (dlogits[: len(base)].to(base.dtype), dlogits[len(base) :][: len(scale)].to(scale.dtype))
    out = dstreams, dfn, dbase, dscale
    return *(grad if need else None for grad, need in zip(out, needs)), None, None, None, None


_read.register_autograd(_read_gradients, setup_context=_keep_read)


class _Passing(Function):
    """The streams as they are; their gradient goes to `link`, through which `_read` gets it."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, link: Tensor) -> Tensor:
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


# collapse ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::hyper_collapse", mutates_args=())
def _collapse(streams: Tensor, pre: Tensor) -> Tensor:
    return launch.collapse(streams, pre)


@_collapse.register_fake
def _(streams: Tensor, pre: Tensor) -> Tensor:
    return streams.new_empty(streams.shape[0], streams.shape[2])


@torch.library.custom_op("abyssal::hyper_collapse_backward", mutates_args=())
def _collapse_backward(du: Tensor, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    return launch.collapse_backward(du, streams, pre)


@_collapse_backward.register_fake
def _(du: Tensor, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    return streams.new_empty(streams.shape), pre.new_empty(pre.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _collapse_gradients(ctx: Any, du: Tensor) -> tuple[Tensor, Tensor]:
    return _collapse_backward(du, *ctx.saved_tensors)


_collapse.register_autograd(_collapse_gradients, setup_context=_keep)


# recombination -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("abyssal::hyper_recombine", mutates_args=())
def _recombine(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return launch.recombine(output, streams, post, comb)


@_recombine.register_fake
def _(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return streams.new_empty(streams.shape)


@torch.library.custom_op("abyssal::hyper_recombine_backward", mutates_args=())
def _recombine_backward(
    grad: Tensor, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch.recombine_backward(grad, output, streams, post, comb)


@_recombine_backward.register_fake
def _(
    grad: Tensor, output: Tensor, streams: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, dx, dpost, dcomb = (x.new_empty(x.shape) for x in (output, streams, post, comb))
    return dy, dx, dpost, dcomb


def _recombine_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _recombine_backward(grad, *ctx.saved_tensors)


_recombine.register_autograd(_recombine_gradients, setup_context=_keep)
