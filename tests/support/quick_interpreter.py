"""Triton's interpreter without what it does again and again: at every call of a device function it looks
through all of `triton.language` and replaces what the launch around the call has replaced already; at every
operation it makes a table of dtypes, and works out again what two types of operands give; for every sum of
integers it computes whether it is in range, for an assertion that nobody asked for; and for every result it
builds the shape anew, a constant for each number and a type for each constant.

Measured: 2 cores, Triton 3.9.0, 2026-11-22: MXFP4's expert kernels take 18 s of CPU for 33 s with the first
two alone, and give the same numbers. Without the ranges int4's take 14 s for 21 s.
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


def begin() -> None:
    """For the first line of a process that runs kernels under the interpreter: it does, and without delay;
    and memory that nobody has written holds NaN, or the largest integer, wherever it is allocated. Else a
    kernel that leaves something out could find there what a sound one had written before it."""
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty gives
    assert torch.empty(1).isnan(), "torch.utils.deterministic.fill_uninitialized_memory is off"
    interpreter._patch_lang = _Patches(interpreter._patch_lang)
    made, scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: scalar(type) if type.__class__ is tl.dtype else made(type)
    tl.core.block_type.__init__ = _block_type
    tl.core.tensor.__init__ = _tensor
    semantic = triton.language.semantic.TritonSemantic
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)
    semantic.broadcast_impl_value = _unless_alike(semantic.broadcast_impl_value)
    semantic.cast = _unless_the_same(semantic.cast)
    if not interpreter.InterpreterOptions.debug:
        semantic.binary_op_sanitize_overflow_impl = lambda *_: None


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
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    return quick


def _unless_the_same(cast: Any) -> Any:
    def quick(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, fp_downcast_rounding)

    return quick


def _numbers(shape: Any) -> tuple[int, ...]:
    """Out of a list, a tuple or Triton's tuple of numbers or of constants."""
    return tuple([number.value if number.__class__ is tl.constexpr else number for number in shape])


@functools.cache
def _of_block(shape: tuple[int, ...], element: str) -> tuple[Any, int, str]:
    if not shape:
        raise TypeError("0d block_type is forbidden")
    sizes = tl.core.tuple(shape)
    return sizes, tl.core.validate_block_shape(sizes), f"<{sizes}, {element}>"


@functools.cache
def _of_tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


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
