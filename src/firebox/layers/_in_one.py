"""Kernels that do in one launch what several do otherwise: taken only where that was measured to be
faster."""

from __future__ import annotations

import functools

from firebox.kernels.plan import Made

ONE, APART = "one", "apart"
SLOWER, NOT_MEASURED = "was measured to be slower", "not measured to be faster"


@functools.cache
def apart(launches: str, instead_of: str = "", why_not: str = NOT_MEASURED) -> Made:
    """For the plan: nothing, since `launches` (such as "two launches") stand in. `instead_of`: what was
    measured and is not taken, and why; `why_not`: otherwise, of one launch."""
    why = f"{launches} instead of {instead_of}" if instead_of else NOT_MEASURED
    return Made(APART, why, (), ((ONE, instead_of or why_not),))
