"""Kernels that do in one launch what several do otherwise: taken only where that was measured to be
faster."""

from __future__ import annotations

import functools

from firebox.kernels.plan import Made

ONE, APART = "one", "apart"


@functools.cache
def apart(launches: str, instead_of: str = "") -> Made:
    """For the plan: nothing, since `launches` (such as "two launches") stand in. `instead_of`: what was
    measured and is not taken, and why."""
    why = f"{launches} instead of {instead_of}" if instead_of else "not measured to be faster"
    return Made(APART, why, ())
