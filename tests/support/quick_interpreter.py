"""Triton's interpreter without what it does again and again: at every call of a device function it looks
through all of `triton.language` and replaces what the launch around the call has replaced already; at every
operation it makes a table of dtypes, and works out again what two types of operands give, and what a number
becomes beside a tensor; for every sum of integers it computes whether it is in range, for an assertion that
nobody asked for; and for every result it builds the shape anew, a constant for each number and a type for
each constant.

Measured: 2 cores, Triton 3.9.0, 2026-11-22: MXFP4's expert kernels take 18 s of CPU for 33 s with the first
two alone, and give the same numbers. Without the ranges int4's take 14 s for 21 s; with numbers and shapes
made once 6.4 s for 8.6 s (2026-11-24).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from firebox.kernels.launch import INTERPRETED

BUILTIN = tl.core.add.__code__  # what `builtin` of triton.language.core makes of every function
PLAIN = {tl.tensor, tl.dtype, tl.block_type, int, float, bool, str, type(None)}
SHAPES: dict[int, tuple[int, ...]] = {}  # id → numbers, of shapes that are kept for good


def begin() -> None:
    """For the first line of a process that runs kernels under the interpreter: it does, and without delay;
    and memory that nobody has written holds NaN, or the largest integer, wherever it is allocated. Else a
    kernel that leaves something out could find there what a sound one had written before it."""
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    interpreter._patch_lang = _Patches(interpreter._patch_lang)
    interpreter._patch_attr = _patch_attr
    made, scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: (
        scalar(type.scalar) if type.scalar.__class__ is tl.dtype else made(type)
    )
    unwrap = tl.core._unwrap_if_constexpr
    tl.core._unwrap_if_constexpr = lambda value: value if value.__class__ in PLAIN else unwrap(value)
    tl.core.block_type.__init__ = _block_type
    tl.core.tensor.__init__ = _tensor
    semantic = triton.language.semantic.TritonSemantic
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)
    semantic.cast = _unless_the_same(semantic.cast)
    semantic.binary_op_type_checking_impl = _numbers_made_once(semantic.binary_op_type_checking_impl)
    if not interpreter.InterpreterOptions.debug:
        semantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """In place of Triton's own, which looks through the arguments for a `_semantic` to leave out."""
    called = member.__wrapped__ if member.__code__ is BUILTIN else member

    def call(*args: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return called(*args, **named)

    scope.set_attr(obj, name, call)


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """In place of Triton's own: the same attributes."""
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _of_block(_numbers(shape), element_ty.name)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """In place of Triton's own: the same attributes."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _of_tensor(_numbers(type.shape) if type.is_block() else ())


def _unless_alike(broadcast: Any) -> Any:
    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        sizes = SHAPES[id(lhs.shape)], SHAPES[id(rhs.shape)]
        both = _of_both(*sizes)
        if both is None:
            return broadcast(self, lhs, rhs)
        return tuple(
            given
            if its == both
            else self.make_tensor(
                self.builder.create_broadcast(given.handle, both), tl.block_type(given.dtype, both)
            )
            for given, its in zip((lhs, rhs), sizes, strict=True)
        )

    return quick


@functools.cache
def _of_both(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that two of as many dimensions have together, if they have one."""
    if not one or len(one) != len(other):
        return None
    fit = all(a == b or 1 in (a, b) for a, b in zip(one, other, strict=True))
    return tuple(map(max, one, other)) if fit else None


def _unless_the_same(cast: Any) -> Any:
    def quick(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, fp_downcast_rounding)

    return quick


def _numbers_made_once(check: Any) -> Any:
    """`check` makes two operands alike. A number beside a tensor that stays as it is becomes one of few."""
    made: dict[Any, Any] = {}

    def quick(self: Any, lhs: Any, rhs: Any, *rest: Any, **named: Any) -> Any:
        behind = lhs.__class__ is tl.tensor  # the number, the tensor
        tensor, number = (lhs, rhs) if behind else (rhs, lhs)
        if tensor.__class__ is not tl.tensor or number.__class__ not in (int, float):
            return check(self, lhs, rhs, *rest, **named)
        exact = number if number.__class__ is int else number.hex()  # 0.0 == -0.0
        key = (exact, tensor.dtype.name, id(tensor.shape), behind, rest, *named.items())
        if key not in made:
            alike = check(self, lhs, rhs, *rest, **named)
            if alike[not behind] is not tensor:
                return alike
            made[key] = alike[behind]
            made[key].handle.data.flags.writeable = False
        return (tensor, made[key]) if behind else (made[key], tensor)

    return quick


def _numbers(shape: Any) -> tuple[int, ...]:
    """Out of a list, a tuple or Triton's tuple of numbers or of constants."""
    known = SHAPES.get(id(shape))
    if known is not None:
        return known
    return tuple([number.value if number.__class__ is tl.constexpr else number for number in shape])


@functools.cache
def _of_block(shape: tuple[int, ...], element: str) -> tuple[Any, int, str]:
    if not shape:
        raise TypeError("0d block_type is forbidden")
    sizes = tl.core.tuple(shape)
    SHAPES[id(sizes)] = shape
    return sizes, tl.core.validate_block_shape(sizes), f"<{sizes}, {element}>"


@functools.cache
def _of_tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
    sizes = tl.core.tuple([tl.constexpr(size) for size in shape])
    SHAPES[id(sizes)] = shape
    return sizes, tl.constexpr(math.prod(shape))


class _Patches:
    """In place of Triton's function: what a launch replaced is left as it is until the launch ends."""

    def __init__(self, replace: Any) -> None:
        self._replace, self._replaced = replace, set[int]()

    def __call__(self, function: Any) -> Any:
        seen = _languages(function)
        if seen and seen <= self._replaced:
            return interpreter._LangPatchScope()  # nothing that it would restore
        scope = self._replace(function)
        self._replaced |= seen
        restore = scope.restore

        def restored() -> None:
            self._replaced.clear()
            restore()

        scope.restore = restored
        return scope


@functools.cache
def _languages(function: Any) -> frozenset[int]:
    """The modules that Triton would replace functions of: those that this one sees."""
    return frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
