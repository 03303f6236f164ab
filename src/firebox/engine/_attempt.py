"""One attempt at a launch before the port opens: where it is made, what came of it, and which exceptions say
something of the launch rather than of us:

    TritonError                        it does not compile, or asks for more than a block gets
                                       (OutOfResources)
    torch.AcceleratorError, and a      the driver, the runtime or a library refused it ("invalid argument",
    RuntimeError that begins with      CUBLAS_STATUS_…), or it ended so ("an illegal memory access")
    one of DEVICE_ERRORS

Another tile may do better there. All else (our assertions, shapes that do not go together, no memory for a
trial's own numbers) is a mistake of the trial, no other tile would help, and the start ends with it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from firebox.engine.runner import in_words
from firebox.hardware.base import Gpu
from firebox.kernels._veto import Choice

DEVICE_ERRORS = ("Triton Error [CUDA]", "CUDA error")


@dataclass(frozen=True)
class Result:
    """What came of `launch` at `tokens`: its relative `error`, infinite where something is not a number, and
    the `limit`. `choice`: what to veto; None where there is no other. `raised`: the exception that came
    instead of a result; the error is infinite then."""

    launch: str
    tokens: int
    error: float
    limit: float
    choice: Choice | None = None
    raised: str = ""

    @property
    def passed(self) -> bool:
        """A NaN does not."""
        return self.error <= self.limit

    @property
    def failure(self) -> str:
        """What is wrong with it."""
        return self.raised or f"off by {self.error:.3g}"


class LaunchFailed(Exception):
    """A launch under test raised; `result` says which and what."""

    def __init__(self, result: Result) -> None:
        super().__init__(f"{result.launch} at {result.tokens} tokens: {result.raised}")
        self.result = result


@dataclass(frozen=True)
class Setup:
    """Where trials run: steps of up to `max_tokens`."""

    gpu: Gpu
    device: torch.device
    max_tokens: int

    def generator(self) -> torch.Generator:
        """The same numbers in every run."""
        return torch.Generator(self.device).manual_seed(1)

    def normal(self, generator: torch.Generator, *shape: int) -> torch.Tensor:
        """N(0, 1) in float32."""
        return torch.randn(*shape, generator=generator, device=self.device)

    def nan(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """What nobody has written yet."""
        return torch.full(shape, torch.nan, device=self.device).to(dtype)

    @contextlib.contextmanager
    def launching(self, launch: str, tokens: int, choice: Choice | None = None) -> Iterator[None]:
        """What is launched in here is `launch`, and has ended afterwards. So has everything else before:
        launches may begin while the one before them runs, and what that writes must be there. Raises
        LaunchFailed."""
        self._settle()
        try:
            yield
            self._settle()
        except Exception as error:
            if not is_of_a_launch(error):
                raise
            raise LaunchFailed(Result(launch, tokens, math.inf, 0.0, choice, in_words(error))) from error

    def is_lost(self) -> bool:
        """Does every call to the GPU fail from now on, as after an illegal access?"""
        try:
            self._settle()
        except RuntimeError:
            return True
        return False

    def release(self) -> None:
        """Gives what trials took back to the driver."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def is_of_a_launch(error: Exception) -> bool:
    """Does it say something of the launch? See above."""
    if isinstance(error, TritonError | torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(DEVICE_ERRORS)
