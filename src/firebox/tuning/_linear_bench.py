"""A linear layer on this GPU, for tuning: random weights in so many copies that no call finds its own in the
L2. What a call writes and reads besides is shared, as it is between the layers of a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, linear, linear_few, quantise_fp8
from firebox.kernels._linear import Problem, Weights
from firebox.layers import _dense_library
from firebox.layers._invented import invented, relative_error, vary
from firebox.layers.dense_gpu import CUBLAS, DTYPES, MANY, LinearKernels, Path, Workspace, requests, rounds
from firebox.tuning._launchers import launcher
from firebox.tuning.base import Candidate
from firebox.tuning.clock import Call

COLD = 4  # times the L2: what a graph reads before it reads the same again
MOST_COPIES = 512  # of a matrix below 0.5 MB, which is then a launch's latency and little else
CHECKED_TOKENS = 24  # of the first, and of the last
# Relative. An output rounded to bf16 is off by 0.0017 RMS, cuBLAS with bias and residual by 0.0027, a 4-bit
# weight times its scale is rounded once more; E4M3 activations of many tokens are off by 0.026.
PLAIN_LIMIT, FP8_LIMIT = 4e-3, 4e-2


def path_of(candidate: Candidate) -> Path:
    """The candidate as the engine's own path."""
    return Path(candidate.path, candidate.config, "tuning")


class Weighted:
    """One layer's weights, several times."""

    def __init__(self, problem: Problem, gpu: Gpu) -> None:
        self.problem, self.gpu = problem, gpu
        self.generator = torch.Generator("cuda").manual_seed(1)
        wanted = COLD * gpu.l2_bytes / _linear.total_bytes(problem)
        first = self._invent()
        self.copies = [first, *(_copy(first) for _ in range(min(MOST_COPIES, int(wanted) + 1)))]

    def _invent(self) -> Weights:
        p, bias = self.problem, None
        dtype = DTYPES[p.dtype]
        weights = Weights(*invented(p.format, p.group, (p.rows,), p.columns, self.generator, dtype))
        scales = (weights.scale, weights.row_scale)
        vary([None if scale is None else scale.unsqueeze(0) for scale in scales], self.generator)
        if p.bias:
            bias = 0.1 * torch.randn(p.rows, generator=self.generator, device="cuda")
        return dataclasses.replace(weights, bias=bias)

    def bench(self, tokens: int) -> LinearBench:
        """For so many tokens."""
        return LinearBench(self, tokens)


def _copy(weights: Weights) -> Weights:
    return Weights(**{name: part.clone() for name, part in vars(weights).items() if part is not None})


class LinearBench:
    """See tuning.base.Bench."""

    def __init__(self, layer: Weighted, tokens: int) -> None:
        self._layer, self._tokens, self.problem = layer, tokens, layer.problem
        p = self.problem
        self._x = self._random(p.columns)
        self._residual = self._random(p.rows) if p.residual else None
        self._out = torch.empty(tokens, p.rows, dtype=DTYPES[p.out_dtype], device="cuda")
        self._space = self._workspace()

    def _random(self, columns: int) -> torch.Tensor:
        shape = (self._tokens, columns)
        values = torch.randn(shape, generator=self._layer.generator, device="cuda")
        return values.to(DTYPES[self.problem.dtype])

    def _workspace(self) -> Workspace:
        """As the engine's, for every tile of the search space."""
        p, tokens, gpu = self.problem, self._tokens, self._layer.gpu
        space = Workspace([p], tokens, gpu, "cuda")
        if tokens <= linear_few.MAX_TOKENS:
            for few in (linear_few.default(p, tokens, gpu), *linear_few.search_space(p, tokens, gpu)):
                space.hold(*linear_few.scratch(p, tokens, few))
        if linear.accepts(p, gpu) is None:
            for many in linear.search_space(p, tokens, gpu):
                space.hold(*linear.scratch(p, tokens, many))
        return space

    # ---- calls

    def calls(self, candidate: Candidate) -> list[Call]:
        """What is launched for each copy of the weights, but rounding the activations."""
        if candidate.path == CUBLAS and linear.quantised(self.problem):
            return self._products(candidate)
        if candidate.path != MANY:
            return self._layers(candidate)
        x, x_scale = self._rounded(candidate)
        assert candidate.request is not None
        chosen = launcher(candidate.request)
        space = self._space
        last = (self._residual, space.partial, self._out, space.counters)
        return [
            functools.partial(linear.run, chosen, self.problem, x, x_scale, weights, *last)
            for weights in self._layer.copies
        ]

    def _products(self, candidate: Candidate) -> list[Call]:
        """A library's, of rounded activations."""
        self._rounding(candidate)()
        x, x_scale = self._codes()
        out, residual, y, found = self._out, self._residual, self._space.y, list[Call]()
        for weights in self._layer.copies:
            bias = None if weights.bias is None else weights.bias.to(out.dtype)
            found.append(
                functools.partial(_dense_library.row_wise, x, x_scale, weights, bias, out, residual, y)
            )
        return found

    def whole(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """The layer as the engine runs it."""
        (candidate,) = parts.values()
        return self._layers(candidate)

    def further(self, path: str, parts: Mapping[str, Candidate]) -> list[Call]:
        """Rounding the activations, once for each copy of the weights."""
        (candidate,) = parts.values()
        if not rounds(self.problem, path):
            return []
        return [self._rounding(candidate)] * len(self._layer.copies)

    def _layers(self, candidate: Candidate, copies: int | None = None) -> list[Call]:
        """Over each copy of the weights, or the first so many."""
        paths = {self._tokens: path_of(candidate)}
        p, gpu = self.problem, self._layer.gpu
        layers = [
            LinearKernels(p, weights, gpu, self._space, paths) for weights in self._layer.copies[:copies]
        ]
        return [functools.partial(layer, self._x, self._out, self._residual) for layer in layers]

    def _rounded(self, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is multiplied: the activations, rounded where the weights are FP8."""
        if not linear.quantised(self.problem):
            return self._x, None
        self._rounding(candidate)()
        return self._codes()

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where they lie in the workspace."""
        p, tokens = self.problem, self._tokens
        groups = p.columns // (linear.x_group(p) or p.columns)
        return self._space.x[: self._x.numel()].view(self._x.shape), self._space.x_scale[: tokens * groups]

    def _rounding(self, candidate: Candidate) -> Call:
        found = requests(self.problem, self._tokens, self._layer.gpu, path_of(candidate))
        return functools.partial(quantise_fp8.run, launcher(found[quantise_fp8.OP]), self._x, *self._codes())

    # ---- the oracle

    def error(self, candidate: Candidate) -> tuple[float, float]:
        """Of the first and the last tokens; no output may be left as it was."""
        space = self._space
        for tensor in (self._out, space.partial, space.x_scale):
            tensor.fill_(torch.nan)
        (call,) = self._layers(candidate, copies=1)
        call()
        limit = FP8_LIMIT if rounds(self.problem, candidate.path) else PLAIN_LIMIT
        if not torch.isfinite(self._out).all() or space.counters.any():
            return float("inf"), limit
        return relative_error(self._out[self._checked].float(), self._wanted), limit

    @functools.cached_property
    def _checked(self) -> torch.Tensor:
        all_of_them = torch.arange(self._tokens, device="cuda")
        return torch.cat((all_of_them[:CHECKED_TOKENS], all_of_them[-CHECKED_TOKENS:]))

    @functools.cached_property
    def _wanted(self) -> torch.Tensor:
        residual = None if self._residual is None else self._residual[self._checked]
        return _linear.reference(self.problem, self._x[self._checked], self._layer.copies[0], residual)
