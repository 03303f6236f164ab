"""The plain CPU: for trying, testing and small models."""

from __future__ import annotations

from firebox.hardware.base import Gpu

NAME = "cpu"


def describe(memory_bytes: int, memory_free_bytes: int, cores: int, facts: frozenset[str]) -> Gpu:
    """The CPU of this machine, from what `hardware.probe` measured."""
    return Gpu(
        name=NAME,
        kind="cpu",
        memory_bytes=memory_bytes,
        memory_free_bytes=memory_free_bytes,
        cpu_cores=cores,
        facts=facts,
        unified_memory=True,
    )
