"""Makes Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU computes, for kernels on CPU tensors.

The interpreter keeps bfloat16 and float8 as bit patterns in numpy, so that out of the box products, sums and
comparisons of bfloat16 are integer arithmetic on those patterns and conversions to it truncate. `range(0, n)` with a
run-time n fails with numpy >= 2.4 (triton 3.6), a comparison of scalars is no mask (3.9), libdevice returns None, and a
product goes through a BLAS, whose bits for one row depend on the others.
`install()` repairs this and makes it faster (interp_speed.py); call it once, with the variable set before triton was
imported.
"""

import os
from typing import Any

import interp_speed
import numpy as np
import torch


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, rounded to nearest even; too large is infinite."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def added_in_order(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c in float32, one product after another along k.

    The bits of an element depend on its own row and column alone; those of a BLAS also on how many others there are,
    and on the processor.
    """
    columns, total = np.ascontiguousarray(np.swapaxes(a, -1, -2), dtype=np.float32), c.copy()
    rows, product = np.ascontiguousarray(b, dtype=np.float32), np.empty_like(c)
    for k in range(rows.shape[-2]):
        np.multiply(columns[..., k, :, None], rows[..., k, None, :], out=product)
        total += product
    return total


def install() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_abyssal_shim"):
        interpreter._abyssal_shim = True  # type: ignore[attr-defined]
        _repair_arithmetic(interpreter)
        _repair_reductions(interpreter)
        _repair_ranges(interpreter)
        _repair_libdevice(interpreter)
        interp_speed.hasten(interpreter)


def _repair_arithmetic(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    float8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    stock = {
        name: getattr(builder, name)
        for name in ("binary_op", "ternary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_dot", "create_fma")
    }

    def wide(h: Any) -> np.ndarray:
        return widened(h.data) if _is_bf16(h) else h.data

    def like_bf16(out: np.ndarray) -> Any:
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(narrowed(out), tl.bfloat16)

    def binary_op(self, a, b, op):
        if _is_bf16(a) or _is_bf16(b):
            return like_bf16(op(wide(a), wide(b)))
        out = stock["binary_op"](self, a, b, op)
        return handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out

    def ternary_op(self, a, b, c, op):
        if op is not np.where and any(_is_bf16(h) for h in (a, b, c)):
            return like_bf16(op(wide(a), wide(b), wide(c)))
        return stock["ternary_op"](self, a, b, c, op)

    def unary_op(self, a, op):
        return like_bf16(op(wide(a))) if _is_bf16(a) else stock["unary_op"](self, a, op)

    def create_fma(self, a, b, c):
        return like_bf16(wide(a) * wide(b) + wide(c)) if _is_bf16(c) else stock["create_fma"](self, a, b, c)

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16:
            return source if _is_bf16(source) else handle(narrowed(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bf16(source):
            source = handle(wide(source), tl.float32)
            return source if to.scalar == tl.float32 else stock["cast_impl"](self, source, to)
        return stock["cast_impl"](self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        if rounding is not None and str(rounding).lower().endswith("rtz"):
            return stock["create_fp_to_fp"](self, source, to, rounding)
        kind = source.dtype.scalar
        if kind in float8:
            values = torch.from_numpy(np.ascontiguousarray(source.data)).view(float8[kind]).float().numpy()
            source, kind = handle(values.reshape(source.data.shape), tl.float32), tl.float32
        if to.scalar in float8:
            x = torch.from_numpy(np.ascontiguousarray(wide(source)).astype(np.float32))
            most = torch.finfo(float8[to.scalar]).max
            bits = torch.where(x.isnan(), x, x.clamp(-most, most)).to(float8[to.scalar]).view(torch.uint8)
            return handle(bits.numpy().reshape(source.data.shape), to.scalar)
        if tl.bfloat16 in (kind, to.scalar):
            return cast_impl(self, source, to)
        return stock["create_fp_to_fp"](self, source, to, rounding)

    def create_dot(self, a, b, c, precision, imprecise):
        if c.data.dtype != np.float32 or a.data.itemsize == 1:
            return stock["create_dot"](self, a, b, c, precision, imprecise)
        return handle(added_in_order(wide(a), wide(b), c.data), tl.float32)

    for function in (binary_op, ternary_op, unary_op, create_fma, cast_impl, create_fp_to_fp, create_dot):
        setattr(builder, function.__name__, function)


def _is_bf16(h: Any) -> bool:
    return h.data.dtype == np.uint16 and h.dtype.scalar.name == "bf16"


def _repair_reductions(interpreter: Any) -> None:
    """Reductions and scans bypass the builder: around them bfloat16 becomes float32."""
    import triton.language as tl

    def converted(t: Any, data: np.ndarray, dtype: Any) -> Any:
        kind = tl.block_type(dtype, list(t.type.shape)) if t.type.is_block() else dtype
        return tl.core.tensor(interpreter.TensorHandle(data, dtype), kind)

    def repaired(stock: Any) -> Any:
        def apply_impl(self, inputs):
            narrow = [_is_bf16(t.handle) for t in inputs]
            if not any(narrow):
                return stock(self, inputs)
            out = stock(
                self,
                tuple(converted(t, widened(t.handle.data), tl.float32) if b else t for t, b in zip(inputs, narrow)),
            )
            outs = out if isinstance(out, (list, tuple)) else (out,)
            outs = tuple(
                converted(o, narrowed(o.handle.data), tl.bfloat16) if b and o.handle.dtype.scalar == tl.float32 else o
                for o, b in zip(outs, narrow)
            )
            return outs if isinstance(out, (list, tuple)) else outs[0]

        return apply_impl

    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = repaired(operation.apply_impl)


def _repair_ranges(interpreter: Any) -> None:
    stock = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    if "scope" in stock.__code__.co_varnames[: stock.__code__.co_argcount]:
        interpreter._patch_lang_tensor = patch


def _repair_libdevice(interpreter: Any) -> None:
    import triton.language as tl
    from triton.language.extra import libdevice

    def lifted(function: Any) -> Any:
        def call(*args):
            args = [a if isinstance(a, tl.core.tensor) else interpreter.interpreter_semantic.to_tensor(a) for a in args]
            out = function(*(a.handle.data for a in args))
            dtype = args[0].handle.dtype.scalar
            kind = tl.block_type(dtype, list(out.shape)) if args[0].type.is_block() else dtype
            return tl.core.tensor(interpreter.TensorHandle(out, dtype), kind)

        return call

    for name in ("tanh", "exp", "expm1", "log", "log1p", "sqrt", "round", "rint", "trunc", "arctan2"):
        setattr(libdevice, {"arctan2": "atan2"}.get(name, name), lifted(getattr(np, name)))
