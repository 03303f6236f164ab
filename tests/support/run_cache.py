"""A folder for compiled kernels that all tests of one run share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def run_cache(factory: pytest.TempPathFactory) -> Path:
    """FIREBOX_CACHE_DIR for tests that ask what a compile finds, not whether it is made anew. It is empty
    when the run begins; its workers' folders lie side by side."""
    mine = factory.getbasetemp()
    return (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "compiled"
