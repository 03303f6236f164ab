"""Kernels that this process has loaded, one for the same code, whichever task and bench launches it."""

from __future__ import annotations

from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.tuning.base import code_of

_LAUNCHERS: dict[str, Launcher] = {}


def launcher(request: CompileRequest) -> Launcher:
    """Not loaded yet when it is asked for the first time: see Launcher.load."""
    return _LAUNCHERS.setdefault(code_of(request), Launcher(request))
