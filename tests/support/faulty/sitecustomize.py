"""Faults for engine processes of tests. Python imports this file when it starts, if its folder is on
PYTHONPATH; the product knows nothing of it.

A step raises that holds a request with one of these tokens at the head of its prompt, once the request has
so many tokens as stand beside it:

    POISON    a plain exception, at once
    LATE      the same, after a few tokens
    MEMORY    the step asks for more memory than there is
    ILLEGAL   a kernel reads out of bounds, after which the GPU's context is lost; on a CPU that is feigned
"""

from __future__ import annotations

import sys
from typing import Any

POISON, LATE, MEMORY, ILLEGAL = 11, 12, 13, 14
LATE_TOKENS = 6


def break_steps() -> None:
    """Puts the faults into this process's runners."""
    import torch

    from firebox.engine.gpu_runner import GpuRunner
    from firebox.engine.runner import Runner
    from firebox.errors import EngineDied

    def fault(plan: Any, device: torch.device) -> None:
        for chunk in plan.chunks:
            first, known = chunk.request.token_ids[0], len(chunk.request.token_ids)
            if first == POISON or (first == LATE and chunk.request.output_tokens >= LATE_TOKENS):
                raise RuntimeError(f"a kernel failed, with {known} tokens known\nand more lines")
            if first == MEMORY:
                torch.empty(2**55, dtype=torch.uint8, device=device)
            if first == ILLEGAL:
                if device.type == "cpu":
                    raise EngineDied("the context is lost")
                torch.zeros(4, device=device)[torch.full((4,), 2**20, device=device)].sum().item()

    def broken(method: Any) -> Any:
        def run(self: Runner, plan: Any, *rest: Any) -> Any:
            fault(plan, self._device)
            return method(self, plan, *rest)

        return run

    recovered = Runner.recover

    def recover(self: Runner, error: Exception) -> None:
        if isinstance(error, EngineDied):  # the feigned one
            raise error
        recovered(self, error)

    Runner.run = broken(Runner.run)  # type: ignore[method-assign]
    Runner.recover = recover  # type: ignore[method-assign]
    GpuRunner.run = broken(GpuRunner.run)  # type: ignore[method-assign]
    GpuRunner.launch = broken(GpuRunner.launch)  # type: ignore[method-assign]


if "firebox.engine" in sys.orig_argv:
    break_steps()
