"""Compiled kernels that can be launched. A launch is a CompileRequest (kernels/compile.py) with a grid and
arguments; the same request compiles once in a process and runs from then on without Triton's just-in-time
machinery, which would look at every argument at every call.

Under Triton's interpreter (TRITON_INTERPRET=1) the kernel itself runs, on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import triton

from firebox.kernels import _triton
from firebox.kernels.compile import PINNED_OPTIONS, CompileRequest

OBSERVERS: list[Callable[[CompileRequest], None]] = []  # told of every launch before it is made
Grid = tuple[int, int, int]
INTERPRETED: bool = triton.knobs.runtime.interpret


def observe(*requests: CompileRequest) -> None:
    """Tells the observers; whoever launches without a Launcher calls it too."""
    for observer in OBSERVERS:
        for request in requests:
            observer(request)


@dataclass(frozen=True, eq=False)
class Launcher:
    """One compiled kernel on this machine's GPU. Calling it puts a launch on the current stream."""

    request: CompileRequest

    def __call__(self, grid: Grid, **arguments: Any) -> None:
        """`arguments`: every run-time argument of the request, by its name."""
        observe(self.request)
        values = {**arguments, **self.request.constexprs}
        names = self.request.kernel.arg_names
        if INTERPRETED:
            self.request.kernel[grid](**values)
        else:
            self._compiled[grid](*(values[name] for name in names))

    def load(self) -> None:
        """Does what the first call would do besides launching: compiles, or reads the binary from disk, and
        builds the C function that hands over the arguments."""
        if not INTERPRETED:
            _triton.load(self._compiled)

    @functools.cached_property
    def _compiled(self) -> Any:
        request = self.request
        given = {**request.signature, **dict.fromkeys(request.constexprs, "constexpr")}
        types = {name: given[name] for name in request.kernel.arg_names}
        source = _triton.source(request.kernel, types, dict(request.constexprs), request.aligned)
        chosen: Mapping[str, Any] = {"num_warps": request.num_warps, "num_stages": request.num_stages}
        options = {**PINNED_OPTIONS, **request.options, **chosen}
        return _triton.compile_in_process(source, request.gpu.triton_target, options)
