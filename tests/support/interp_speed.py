"""Makes Triton's interpreter (TRITON_INTERPRET=1) take less time, and nothing else: every result comes from the same
operations of numpy on the same arrays.

Most of the interpreter's time goes to Python around numpy: types and shapes that are made anew for every value, and a
check of integers for overflow that nobody reads.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any


def hasten(interpreter: Any) -> None:
    _leave_out_unread_checks(interpreter)
    _remember_types(interpreter)
    _remember_shapes(interpreter)
    _index_plainly()
    _call_directly(interpreter)
    _patch_once(interpreter)


def _leave_out_unread_checks(interpreter: Any) -> None:
    """Each sum and product of integers is computed in int64 too and compared, but asserted only in debug mode."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _remember_types(interpreter: Any) -> None:
    import triton.language as tl

    core, stock, known = tl.core, interpreter._get_np_dtype, {}
    unwrap, equal, plain = core._unwrap_if_constexpr, tl.dtype.__eq__, {tl.tensor, tl.dtype, int, float, bool}
    integers = frozenset(tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES)

    def np_dtype(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = stock(kind)
        return known[name]

    interpreter._get_np_dtype = np_dtype
    core._unwrap_if_constexpr = lambda o: o if o.__class__ in plain else unwrap(o)
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    tl.dtype.is_int = lambda self: self.name in integers


def _remember_shapes(interpreter: Any) -> None:
    """Blocks of one type share it, those of one shape its tuples, to which nobody writes; of one shape are those that
    share it.
    """
    import triton.language as tl

    core, semantic, stock = tl.core, interpreter.TritonSemantic, tl.block_type.__init__
    broadcast, no_shape, one = semantic.broadcast_impl_value, core.tuple([]), core.constexpr(1)
    tl.pointer_type.__hash__ = tl.dtype.__hash__

    @functools.cache
    def shaped(*shape: int) -> tuple[Any, int, str, Any]:
        stock(block := object.__new__(tl.block_type), tl.int1, list(shape))
        return block.shape, block.numel, str(block.shape), core.tuple([core.constexpr(n) for n in shape])

    @functools.cache
    def block(element_ty, *shape: int) -> Any:
        return tl.block_type(element_ty, list(shape))

    def init_block(self, element_ty, shape):
        shape = [core._unwrap_if_constexpr(n) for n in core._unwrap_if_constexpr(shape)]
        self.element_ty = element_ty
        self.shape, self.numel, name, self.shape_of_tensors = shaped(*shape)
        self.name = f"<{name}, {element_ty}>"

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype, self.shape, self.numel = handle, type, type.scalar, no_shape, one
        if type.is_block():
            self.shape, self.numel = type.shape_of_tensors, core.constexpr(type.numel)

    def broadcast_impl_value(self, lhs, rhs):
        same = getattr(lhs.type, "shape", self) is getattr(rhs.type, "shape", None)
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
    tl.block_type.with_element_ty = lambda self, element_ty: block(element_ty, *self.shape.values)
    tl.block_type.to_ir = lambda self, builder: self
    semantic.broadcast_impl_value = broadcast_impl_value


def _index_plainly() -> None:
    """Triton's tuples make a constant of an index, and a tuple of a list that they are compared with."""
    from triton.language import core

    item, equal = core.tuple.__getitem__, core.tuple.__eq__

    def compare(self, other):
        return core.constexpr(self.values == other) if other.__class__ is list else equal(self, other)

    core.tuple.__getitem__ = lambda self, i: self.values[i] if i.__class__ is int else item(self, i)
    core.tuple.__eq__ = compare


def _call_directly(interpreter: Any) -> None:
    """A builtin gets its `_semantic` by one call instead of three."""

    def patch(obj, name, member, builder, scope):
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch


def _patch_once(interpreter: Any) -> None:
    """The language is made to interpret once for all: stock does it anew in every call of a device function."""
    import triton.language as tl

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
