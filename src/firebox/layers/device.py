"""What the layers of one model share on an NVIDIA GPU: the device's description and the memory between
launches. Layers ask for it while they are made, and it grows to what the largest needs; nothing grows once
the model has finished loading."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from firebox.hardware.base import Gpu

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.kernels import _experts, _gated_delta, _linear
    from firebox.kernels.launch import Launcher
    from firebox.layers import delta_gpu, dense_gpu, experts, route_gpu

KERNEL_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "fp8"}


class Device:
    """`max_tokens`: of a step."""

    def __init__(self, gpu: Gpu, device: torch.device, max_tokens: int) -> None:
        self.gpu, self.device, self.max_tokens = gpu, device, max_tokens
        self._linears: dense_gpu.Workspace | None = None
        self._counted: set[_linear.Problem] = set()
        self._experts: dict[Any, experts.Workspace] = {}
        self._deltas: dict[_gated_delta.Problem, delta_gpu.Workspace] = {}
        self._routes: route_gpu.Workspace | None = None

    def linear(self, problem: _linear.Problem, weights: _linear.Weights) -> dense_gpu.LinearKernels:
        """A linear layer, with room for it in the workspace that all of them share."""
        from firebox.layers import dense_gpu

        if self._linears is None:
            self._linears = dense_gpu.Workspace([], self.max_tokens, self.gpu, self.device)
        if problem not in self._counted:
            self._counted.add(problem)
            self._linears.grow(dense_gpu.Workspace([problem], self.max_tokens, self.gpu, self.device))
        return dense_gpu.LinearKernels(problem, weights, self.gpu, self._linears)

    def experts(
        self, problem: _experts.Problem, gate_up: _experts.Weights, down: _experts.Weights
    ) -> experts.Experts:
        """The routed experts of a layer. Layers that are alike share a workspace."""
        from firebox.layers import experts

        if problem not in self._experts:
            self._experts[problem] = experts.Workspace(problem, self.max_tokens, self.device)
        return experts.Experts(problem, gate_up, down, self.gpu, self._experts[problem])

    @property
    def workspace_bytes(self) -> int:
        """Of all workspaces."""
        alike = [*self._experts.values(), *self._deltas.values()]
        return sum(map(tensor_bytes, [self._linears, self._routes, *alike]))

    def gated_delta(
        self, problem: _gated_delta.Problem, weights: _gated_delta.Weights
    ) -> delta_gpu.DeltaKernels:
        """The recurrence of a gated delta net. Layers that are alike share a workspace."""
        from firebox.layers import delta_gpu

        if problem not in self._deltas:
            self._deltas[problem] = delta_gpu.Workspace(problem, self.max_tokens, self.device)
        return delta_gpu.DeltaKernels(problem, weights, self.gpu, self._deltas[problem])

    def routes(self) -> route_gpu.Workspace:
        """What all routers of one token share."""
        from firebox.layers import route_gpu

        if self._routes is None:
            self._routes = route_gpu.Workspace(self.device)
        return self._routes

    def launcher(self, kernel: Any, problem: Any) -> Launcher:
        """The one launch of a kernel of `kernels/` for `problem`; each is compiled once."""
        return _launcher(kernel, problem, self.gpu)


def tensor_bytes(value: Any) -> int:
    """Of all tensors in a workspace; None is nothing."""
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    return 0 if value is None else sum(tensor_bytes(part) for part in vars(value).values())


@functools.cache
def _launcher(kernel: Any, problem: Any, gpu: Gpu) -> Launcher:
    from firebox.kernels.launch import INTERPRETED, Launcher

    return Launcher(kernel.request(problem, gpu, interpreted=INTERPRETED))
