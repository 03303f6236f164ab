"""The contract of a kernel. A kernel is a file in this room, in five parts, in this order:

    1. OP, Problem, accepts          what it computes, its sizes, None or why it cannot run a problem
    2. the device code
    3. bind                          packs weights and returns a callable over torch tensors
    4. reference                     the same result in plain torch, slowly
    5. inputs, CASES, tolerance      what tests, tuner and benchmark run it on: the launcher's arguments
                                     in order, and under "weights" what `bind` takes

The selector (`kernels.select`) asks every kernel of an OP; tests/cpu/kernels runs every kernel over its own
CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from firebox.hardware.base import Gpu


class Kernel(Protocol):
    """A kernel's module (see above). `Problem` is a frozen dataclass of sizes; `CASES` are the sizes tests
    run."""

    OP: str
    CASES: Sequence[Any]

    def accepts(self, problem: Any, gpu: Gpu) -> str | None:
        """None, or one sentence that says why this kernel cannot run the problem on that device."""
        ...

    def bind(
        self, problem: Any, weights: Mapping[str, torch.Tensor], threads: int
    ) -> Callable[..., torch.Tensor]:
        """Packs the weights into the kernel's own layout (the originals may then be dropped) and returns the
        launcher."""
        ...

    def reference(self, problem: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The result in plain torch, from what `inputs` made."""
        ...
