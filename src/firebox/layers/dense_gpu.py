"""A dense linear layer on an NVIDIA GPU: y = x · Wᵀ (+ bias) (+ residual) in every weight format, over the
kernel of few tokens, that of many, and torch's own products.

    one      one launch: linear_one, for one token and without groups of columns
    few      one launch: linear_few, up to 64 tokens
    many     with FP8 weights quantise_fp8 first, then linear
    cublas   a library (_dense_library.py): unquantised weights; fp8_channel behind quantise_fp8

Which path and which tiles a number of tokens takes is measured (kernels/_tuned.py, linear.json); without a
measurement it is few up to 64 tokens, and tiles that fit everywhere. FP8 goes to the library only by a
measurement: whether torch can depends on its build and on the GPU. So does a single token to its own kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _tuned, _veto, linear, linear_few, linear_one, quantise_fp8
from firebox.kernels._linear import Problem, Weights, operand, weight_bytes
from firebox.kernels.compile import CompileRequest, limit_bytes
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.kernels.plan import Compile, Losers, Made
from firebox.layers import _dense_library, _fitting

ONE, FEW, MANY, CUBLAS = "one", "few", "many", "cublas"
MODULES = {ONE: linear_one, FEW: linear_few, MANY: linear}
TUNED = "linear"  # the file in tuned/<gpu>/
WIDEST_TILE = 256  # tokens of a tile of linear.py
DEFAULT_TILE = 128  # tokens of those that linear.py's default counts
RULE = "for want of a measurement"
ONLY_MEASURED = "only a measurement chooses it"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class Path:
    """How a number of tokens is computed. `config`: the tile, None for a library. `why`: "measured",
    "predicted", "default" for want of both, or why no kernel here runs it; and that weights alone are
    quantised, where they are."""

    name: str
    config: Any
    why: str


def key(problem: Problem) -> str:
    """How linear.json calls a problem."""
    group = f" group={problem.group}" if problem.group else ""
    return f"{problem.format}{group} rows={problem.rows} columns={problem.columns}"


def choice_of(problem: Problem, path: Path) -> _veto.Choice:
    """What is vetoed of a path."""
    return (TUNED, problem, path.name, path.config)


def path_of(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    """The path and tiles for so many tokens; not those whose results were wrong, nor, under a limit to shared
    memory, those that need more."""
    candidates = (_within_limit(problem, tokens, path, gpu) for path in _candidates(problem, tokens, gpu))
    path, failed = _veto.first_allowed(candidates, lambda path: choice_of(problem, path), key(problem))
    return replace(path, why=path.why + failed) if failed else path


def _candidates(problem: Problem, tokens: int, gpu: Gpu) -> Iterator[Path]:
    """The chosen one, then what could stand in for it."""
    yield _chosen(problem, tokens, gpu)
    yield stock_path(problem, tokens, gpu)
    if linear.unquantised(problem):
        yield Path(CUBLAS, None, "default")
    elif linear.accepts(problem, gpu) is None:
        yield _default(problem, MANY, linear.default(problem, tokens, gpu))


def _chosen(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    barred = [FEW] if tokens > linear_few.MAX_TOKENS else []
    barred += [ONE] if tokens > 1 else []
    if linear.quantised(problem) and _dense_library.accepts(problem, gpu) is not None:
        barred.append(CUBLAS)  # measured for a layer of the same key with another type of output
    entry = _tuned.measured(gpu.name, TUNED, key(problem), tokens, but=barred)
    if entry is not None:
        why = _tuned.how(entry) + multiplied(problem, entry["path"])
        return Path(entry["path"], _config(entry), why)
    return stock_path(problem, tokens, gpu)


def _within_limit(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> Path:
    """`path`, or the nearest tile to its own that needs no more shared memory than it may."""
    if path.name in (ONE, CUBLAS) or not _fitting.is_limited(gpu):
        return path
    alike = like(tokens, path) if path.name == FEW else min(tokens, WIDEST_TILE)
    return _fitted(problem, alike, path, gpu, limit_bytes(gpu))


@_tuned.cached
def _fitted(problem: Problem, tokens: int, path: Path, gpu: Gpu, limit_bytes: int) -> Path:
    module = linear_few if path.name == FEW else linear
    small = replace(gpu, smem_per_block_bytes=limit_bytes)
    entries = [e for e in _tuned.entries(gpu.name, TUNED, key(problem)) if e["path"] == path.name]

    def request(config: Any) -> CompileRequest:
        return requests(problem, tokens, gpu, replace(path, config=config))[module.OP]

    def pipeline_bytes(config: Any) -> float:
        wide = linear_few.padded(tokens) if path.name == FEW else config.tokens
        inner_bytes = 1 if path.name == MANY and linear.quantised(problem) else 2
        step_bytes = config.rows * weight_bytes(problem) + wide * inner_bytes
        return float(step_bytes * config.depth * config.stages)

    space = module.search_space(problem, tokens, small)
    measured = [_config(entry) for entry in entries]
    config, too_much = _fitting.nearest_that_fits(path.config, space, measured, request, pipeline_bytes)
    return replace(path, config=config, why=f"{path.why}; another tile, {too_much}") if too_much else path


def stock_path(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    """What so many tokens take for want of a measurement."""
    if tokens <= linear_few.MAX_TOKENS:
        return _default(problem, FEW, linear_few.default(problem, tokens, gpu))
    if linear.unquantised(problem):
        return Path(CUBLAS, None, "default: unquantised, a library's")
    refusal = linear.accepts(problem, gpu)
    if refusal is not None:
        return Path(CUBLAS, None, f"kernels/linear.py {refusal}")
    return _default(problem, MANY, linear.default(problem, tokens, gpu))


def _default(problem: Problem, name: str, config: Any) -> Path:
    return Path(name, config, "default" + multiplied(problem, name))


def multiplied(problem: Problem, path: str) -> str:
    """What is said of the choice where the weights alone are quantised."""
    if linear.unquantised(problem) or rounds(problem, path):
        return ""
    how = "without tensor cores" if path == ONE else f"as {operand(problem)}"
    return f", weight-only: multiplied {how}"


def losers(problem: Problem, tokens: int, taken: Path, gpu: Gpu) -> Losers:
    """The paths that so many tokens do not take, and why not."""
    others = (name for name in (ONE, FEW, MANY, CUBLAS) if name != taken.name)
    return tuple((name, _why_not(problem, tokens, name, taken, gpu)) for name in others)


def _why_not(problem: Problem, tokens: int, name: str, taken: Path, gpu: Gpu) -> str:
    accepts = _dense_library.accepts if name == CUBLAS else MODULES[name].accepts
    refusal: str | None = accepts(problem, gpu)
    if refusal is not None:
        return refusal
    if name == ONE and tokens > 1:
        return "takes one token"
    if name == FEW and tokens > linear_few.MAX_TOKENS:
        return f"takes up to {linear_few.MAX_TOKENS} tokens"
    if _chosen(problem, tokens, gpu).name == name:
        return taken.why.partition("; instead of ")[2] or "was vetoed"
    if not taken.why.startswith("default"):
        return f"{TUNED}.json names {taken.name}"
    if name == ONE or (name == CUBLAS and linear.quantised(problem)):
        return ONLY_MEASURED
    if tokens <= linear_few.MAX_TOKENS:
        return f"rule: few up to {linear_few.MAX_TOKENS} tokens, {RULE}"
    return f"rule: a library's where weights are unquantised, {RULE}"


def _config(entry: dict[str, Any]) -> Any:
    return None if entry["path"] == CUBLAS else MODULES[entry["path"]].Config(**entry["config"])


def requests(problem: Problem, tokens: int, gpu: Gpu, path: Path | None = None) -> dict[str, CompileRequest]:
    """Every compile that so many tokens launch, by the name of its operation; a library's product is none.
    `path`: instead of the one that `path_of` names."""
    path = path or _path_of(problem, tokens, gpu)
    if path.name == ONE:
        return {linear_one.OP: linear_one.request(problem, path.config, gpu, interpreted=INTERPRETED)}
    if path.name == FEW:
        request = linear_few.request(problem, tokens, path.config, gpu, interpreted=INTERPRETED)
        return {linear_few.OP: request}
    found = {}
    if rounds(problem, path.name) and not problem.normed:
        found[quantise_fp8.OP] = _rounder(problem, gpu).request
    if path.name == MANY:
        found[linear.OP] = linear.request(problem, path.config, gpu, interpreted=INTERPRETED)
    return found


def rounds(problem: Problem, path: str) -> bool:
    """Does this path round the activations to FP8?"""
    return path not in (ONE, FEW) and linear.quantised(problem)


def rounds_at(problem: Problem, tokens: int, gpu: Gpu) -> bool:
    """Does the path of so many tokens?"""
    return rounds(problem, _path_of(problem, tokens, gpu).name)


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many tokens launch, for the plan."""
    path = _path_of(problem, tokens, gpu)
    return _made(problem, like(tokens, path), path, losers(problem, tokens, path, gpu), gpu)


def nearest_fit(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """The same with the nearest tile that fits; where there is none, without tuned files. For who asks what
    would fit."""
    path = chosen = _path_of(problem, tokens, gpu)
    if path.name not in (ONE, CUBLAS):
        path = _fitted(problem, min(tokens, WIDEST_TILE), path, gpu, limit_bytes(gpu))
    if path == chosen:
        path = stock_path(problem, tokens, gpu)
    return _made(problem, like(tokens, path), path, (), gpu)


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py: all up to the widest tile, then those of the measurements and of the default,
    which counts tiles."""
    yield from range(1, WIDEST_TILE + 1)
    yield from range(WIDEST_TILE + 1, max_tokens + 1, DEFAULT_TILE)
    yield from _tuned.turns(gpu.name, TUNED, key(problem))


@functools.cache
def _made(problem: Problem, tokens: int, path: Path, others: Losers, gpu: Gpu) -> Made:
    configs, choice = {linear.OP: path.config}, choice_of(problem, path)
    found = requests(problem, tokens, gpu, path)
    compiles = [Compile(op, request, configs.get(op), choice=choice) for op, request in found.items()]
    if path.name == CUBLAS:
        compiles.append(Compile(linear.OP, None))
    return Made(path.name, path.why, tuple(compiles), others)


def like(tokens: int, path: Path) -> int:
    """The number of tokens whose compiles these share, so that each is made once."""
    return linear_few.padded(tokens) if path.name == FEW else 1


def scratch(problem: Problem, tokens: int, path: Path) -> tuple[int, int]:
    """How many float32 of partial sums and how many int32 counters so many tokens need."""
    if path.name in (ONE, CUBLAS):
        return 0, 0
    if path.name == FEW:
        return linear_few.scratch(problem, tokens, path.config)
    return linear.scratch(problem, tokens, path.config)


class Workspace:
    """The memory between the launches of all of `problems` for up to `max_tokens`; layers that run one after
    the other share it. `partial` and `counters` are for divided columns (`scratch`), `x` and `x_scale` FP8
    activations; `y` a library's FP8 product, before the residual whose place it takes is added."""

    def __init__(
        self, problems: Iterable[Problem], max_tokens: int, gpu: Gpu, device: torch.device | str
    ) -> None:
        sums = tiles = codes = scales = products = 1
        for p in dict.fromkeys(problems):
            for tokens in _that_need_most(p, max_tokens, gpu):
                needed = scratch(p, tokens, _path_of(p, tokens, gpu))
                sums, tiles = max(sums, needed[0]), max(tiles, needed[1])
            if linear.quantised(p):
                groups = p.columns // (linear.x_group(p) or p.columns)
                if not p.normed:
                    codes, scales = max(codes, max_tokens * p.columns), max(scales, max_tokens * groups)
                if p.residual:
                    products = max(products, _most_in_library(p, max_tokens, gpu) * p.rows)
        self.partial = torch.empty(sums, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)
        self.x = torch.empty(codes, dtype=torch.float8_e4m3fn, device=device)
        self.x_scale = torch.empty(scales, dtype=torch.float32, device=device)
        self.y = torch.empty(products, dtype=torch.bfloat16, device=device)

    def hold(self, sums: int, tiles: int) -> None:
        """Makes room for what `scratch` says."""
        device = self.partial.device
        if sums > self.partial.numel():
            self.partial = torch.empty(sums, dtype=torch.float32, device=device)
        if tiles > self.counters.numel():
            self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)

    def grow(self, other: Workspace) -> None:
        """Becomes as large as `other`, part by part."""
        for name, tensor in vars(other).items():
            if tensor.numel() > getattr(self, name).numel():
                setattr(self, name, tensor)


class LinearKernels:
    """One linear layer; see above. `workspace` was made for this problem among others. `paths`: tokens →
    path, instead of what was measured; their scratch must fit the workspace."""

    def __init__(
        self,
        problem: Problem,
        weights: Weights,
        gpu: Gpu,
        workspace: Workspace,
        paths: dict[int, Path] | None = None,
    ) -> None:
        assert all(part is None or part.is_contiguous() for part in vars(weights).values()), problem
        self.problem, self.weights, self.gpu, self.workspace = problem, weights, gpu, workspace
        self.paths = paths or {}
        self._bias = None if weights.bias is None else weights.bias.to(DTYPES[problem.dtype])

    def __call__(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
        codes: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`x` [tokens, columns] → `out` [tokens, rows], plus `residual`, the same shape, where the problem
        has one; `out` may be `residual`. All contiguous. `codes`: x as FP8 and its scales, if the problem is
        `normed` and the path one that `rounds`."""
        tokens = x.shape[0]
        if tokens == 0:
            return
        assert (residual is not None) == self.problem.residual, f"a residual, or none: {self.problem}"
        p, space = self.problem, self.workspace
        path = self.paths.get(tokens) or _path_of(p, tokens, self.gpu)
        launchers = _launchers(p, like(tokens, path), path, self.gpu)
        sums, tiles = scratch(p, tokens, path)
        assert sums <= space.partial.numel() and tiles <= space.counters.numel(), (p, path)
        last = (self.weights, residual, space.partial, out, space.counters)
        if path.name == ONE:
            linear_one.run(launchers[linear_one.OP], p, x, self.weights, residual, out)
            return
        if path.name == FEW:
            linear_few.run(launchers[linear_few.OP], p, x, *last)
            return
        x_scale = None
        if rounds(p, path.name):
            x, x_scale = codes or self._rounded(x)
        if path.name == CUBLAS:
            self._cublas(x, x_scale, out, residual)
        else:
            linear.run(launchers[linear.OP], p, x, x_scale, *last)

    def _rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` as FP8 codes, and their scales; in memory of their own where a norm is to give them, but there
        is none: in a block that torch composes."""
        p, space = self.problem, self.workspace
        scales = x.shape[0] * (p.columns // (linear.x_group(p) or p.columns))
        if p.normed:
            codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
            x_scale = x.new_empty(scales, dtype=torch.float32)
        else:
            codes, x_scale = space.x[: x.numel()].view(x.shape), space.x_scale[:scales]
        quantise_fp8.run(_rounder(p, self.gpu), x, codes, x_scale)
        return codes, x_scale

    def _cublas(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        out: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        if x_scale is None:
            _dense_library.plain(x, self.weights, self._bias, out, residual)
        else:
            y = self.workspace.y
            _dense_library.row_wise(x, x_scale, self.weights, self._bias, out, residual, y)


def _that_need_most(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """Numbers of tokens, of 1 … `max_tokens`; among them is that of the largest scratch. As far as a tile
    with slices may depend on the very number, all; then the last of every run that shares an entry, since
    more tokens of one tile need no less."""
    single = WIDEST_TILE if _fitting.is_limited(gpu) else linear_few.MAX_TOKENS
    yield from range(1, min(max_tokens, single) + 1)
    last = {first - 1 for first in _tuned.turns(gpu.name, TUNED, key(problem))} | {max_tokens}
    yield from (tokens for tokens in sorted(last) if single < tokens <= max_tokens)


def _most_in_library(problem: Problem, max_tokens: int, gpu: Gpu) -> int:
    """The most tokens, of 1 … `max_tokens`, that go to a library; 0 if none do."""
    entries = _tuned.entries(gpu.name, TUNED, key(problem))
    if _dense_library.accepts(problem, gpu) is not None or all(e["path"] != CUBLAS for e in entries):
        return 0
    downwards = range(max_tokens, 0, -1)
    return next((n for n in downwards if _path_of(problem, n, gpu).name == CUBLAS), 0)


@_tuned.cached
def _path_of(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    return path_of(problem, tokens, gpu)


@functools.cache
def _rounder(problem: Problem, gpu: Gpu) -> Launcher:
    rows = quantise_fp8.Problem(problem.columns, linear.x_group(problem), problem.dtype)
    return Launcher(quantise_fp8.request(rows, gpu, interpreted=INTERPRETED))


@functools.cache
def _launchers(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> dict[str, Launcher]:
    return {op: Launcher(request) for op, request in requests(problem, tokens, gpu, path).items()}
