"""Triton's interpreter without what it does again and again: at every call of a device function it looks
through all of `triton.language` and replaces what the launch around the call has replaced already, and at
every operation it makes a table of dtypes.

Measured: 2 cores, Triton 3.9.0, 2026-11-21: a small gpt-oss in MXFP4 takes 8.0 s of CPU for 10.3 s.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

from firebox.kernels.launch import INTERPRETED


def begin() -> None:
    """For the first line of a process that runs kernels under the interpreter: it does, and without delay."""
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    interpreter._patch_lang = _Patches(interpreter._patch_lang)
    made, scalar = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: scalar(type) if type.__class__ is tl.dtype else made(type)


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
