"""Which kernels a number of tokens takes in the routed experts of a layer on an NVIDIA GPU, and with which
tiles; run by layers/experts.py:

    one           moe_gate_up_one, moe_down_one: for one token
    few           moe_gate_up_few, moe_down_few, and where this does not add up, moe_combine
    sorted        moe_sort (two), with FP8 weights quantise_fp8, with most 4-bit weights moe_arrange, then
                  moe_gate_up, moe_down, moe_combine
    block-scaled  with 4-bit floats in nibbles: moe_sort, quantise_groups, moe_gate_up_scaled,
                  quantise_groups, moe_down_scaled, moe_combine

Measured (kernels/_tuned.py); without a measurement it is few up to 16 tokens, block-scaled from where the
data sheet says that bf16 products take longer than reading the weights (kernels/_block_scaled.py), and tiles
that fit everywhere. The first two are weight-only in 4-bit formats: activations stay bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import (
    _block_scaled,
    _tuned,
    _veto,
    moe_arrange,
    moe_combine,
    moe_down,
    moe_down_few,
    moe_down_one,
    moe_down_scaled,
    moe_gate_up,
    moe_gate_up_few,
    moe_gate_up_one,
    moe_gate_up_scaled,
    moe_sort,
    quantise_fp8,
    quantise_groups,
)
from firebox.kernels._experts import FP8, NIBBLES, Problem, operand, weight_bytes
from firebox.kernels.compile import CompileRequest, limit_bytes
from firebox.kernels.launch import INTERPRETED
from firebox.kernels.plan import Compile, Losers, Made
from firebox.layers import _fitting

ONE, FEW, SORTED, SCALED = "one", "few", "sorted", "block-scaled"
TUNED = "experts"  # the file in tuned/<gpu>/
MODULES = {
    ONE: (moe_gate_up_one, moe_down_one),
    FEW: (moe_gate_up_few, moe_down_few),
    SORTED: (moe_gate_up, moe_down),
    SCALED: (moe_gate_up_scaled, moe_down_scaled),
}
FEW_UNMEASURED = 16
SMALLEST_BLOCK = 16  # choices of a sorted tile
COUNTED_UP_TO = 32  # choices of a block: its second half begins when its first is done (kernels/_pdl.py)
BLOCK_SCALED = {"mxfp4": "mxf8", "nvfp4": "nvf4"}  # a checkpoint's format → the instruction for nibbles
RULE = "for want of a measurement"


@dataclass(frozen=True)
class Path:
    """How a number of tokens is computed. `why`: "measured", "predicted", or "default" for want of both, and
    where activations may be of another type than weights what is multiplied."""

    name: str
    gate_up: Any
    down: Any
    why: str

    @property
    def block(self) -> int:
        """Choices that are sorted into one block: the larger tile's."""
        return max(int(self.gate_up.tokens), int(self.down.tokens))


def key(problem: Problem) -> str:
    """How experts.json calls a problem."""
    return _tuned.key(problem)


def choice_of(problem: Problem, path: Path) -> _veto.Choice:
    """What is vetoed of a path."""
    return (TUNED, problem, path.name, path.gate_up, path.down)


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
    for block in (16, 32, 64):
        yield default_path(problem, SORTED, block, gpu)
    if tokens <= moe_gate_up_few.MAX_TOKENS:
        yield default_path(problem, FEW, tokens, gpu)


def _chosen(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    entry = _tuned.nearest(gpu.name, problem, tokens, but=[ONE] if tokens > 1 else [])
    if entry is not None and entry["path"] == FEW and tokens > moe_gate_up_few.MAX_TOKENS:
        entry = _tuned.nearest(gpu.name, problem, tokens, SORTED)
    if entry is not None:
        gate_up, down = (
            module.Config(**entry[part])
            for module, part in zip(MODULES[entry["path"]], ("gate_up", "down"), strict=True)
        )
        if entry["path"] == FEW and tokens > moe_gate_up_few.COLUMNS_UP_TO and down.depth == 0:
            down = moe_down_few.default(problem, tokens, gpu)
        if entry["path"] == FEW and tokens > 1 and down.depth == 0:  # a whole tile's tokens come in one pass
            down = replace(down, tokens=moe_gate_up_few.COLUMNS_UP_TO)
        return Path(entry["path"], gate_up, down, _tuned.how(entry) + _multiplied(problem, entry["path"]))
    return stock_path(problem, tokens, gpu)


def _within_limit(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> Path:
    """`path`, or the nearest tiles to its own that need no more shared memory than they may."""
    if path.name == ONE or not _fitting.is_limited(gpu):
        return path
    return _fitted(problem, like(problem, tokens, path), path, gpu, limit_bytes(gpu))


@_tuned.cached
def _fitted(problem: Problem, tokens: int, path: Path, gpu: Gpu, limit_bytes: int) -> Path:
    small = replace(gpu, smem_per_block_bytes=limit_bytes)
    for part in ("gate_up", "down"):
        path = _fitted_part(problem, tokens, path, part, small)
    return path


def _fitted_part(problem: Problem, tokens: int, path: Path, part: str, gpu: Gpu) -> Path:
    module, tile = MODULES[path.name][part == "down"], getattr(path, part)
    sizes = (tokens,) if path.name == FEW else (tile.tokens, max(tile.tokens // 2, SMALLEST_BLOCK))
    entries = [e for e in _tuned.entries(gpu.name, TUNED, key(problem)) if e["path"] == path.name]

    def request(config: Any) -> CompileRequest:
        return requests(problem, tokens, replace(path, **{part: config}), gpu)[f"moe_{part}"]

    config, too_much = _fitting.nearest_that_fits(
        tile,
        [config for size in sizes for config in module.search_space(problem, size, gpu)],
        [module.Config(**entry[part]) for entry in entries],
        request,
        functools.partial(_pipeline_bytes, problem),
    )
    if not too_much:
        return path
    return replace(path, **{part: config}, why=f"{path.why}; another {part}, {too_much}")


def _pipeline_bytes(problem: Problem, tile: Any) -> float:
    """Roughly what the steps of a tile hold."""
    inner_bytes = 1 if moe_gate_up.quantised(problem) else 2
    step_bytes = tile.rows * weight_bytes(problem) + tile.tokens * inner_bytes
    return float(step_bytes * max(tile.depth, 1) * tile.stages)


def stock_path(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    """What so many tokens take for want of both."""
    if tokens <= FEW_UNMEASURED:
        return default_path(problem, FEW, tokens, gpu)
    native = tokens >= _block_scaled.native_from(problem, gpu)
    block = 32 if tokens < _wide_from(problem) else 64
    return default_path(problem, SCALED if native else SORTED, block, gpu)


def _wide_from(problem: Problem) -> int:
    """The number of tokens from which an expert has 64 choices."""
    return -(-64 * problem.experts // problem.top_k)


def default_path(problem: Problem, name: str, tokens: int, gpu: Gpu) -> Path:
    """For want of a measured one. `tokens`: of the layer (few), or of a tile (the others)."""
    gate_up, down = (module.default(problem, tokens, gpu) for module in MODULES[name])
    return Path(name, gate_up, down, "default" + _multiplied(problem, name))


def stored_as(problem: Problem, gpu: Gpu) -> Problem:
    """`problem`, in a checkpoint's format, as its weights lie on `gpu`: 4-bit floats in nibbles where the
    tensor cores multiply them, so that both paths read the same words; other 4-bit weights in panels."""
    kind = BLOCK_SCALED.get(problem.format)
    if kind and f"mma.{kind}" in gpu.facts:
        return replace(problem, format=f"{problem.format}_nibbles")
    return replace(problem, panels=problem.group > 0)


def _multiplied(problem: Problem, path: str) -> str:
    """What is said of the choice where activations may be of another type than weights, and why."""
    if path == SCALED:
        kind = _block_scaled.kind_of(problem)
        return f", {kind}: bf16 products would take longer than the weights' reading (calculated)"
    if problem.format in NIBBLES:
        return ", weight-only: waits for the weights, not for products (calculated)"
    if problem.format == "bf16" or (path == SORTED and problem.format in FP8):
        return ""
    multiplied = "without tensor cores" if path == ONE else f"as {operand(problem)}"
    return f", weight-only: multiplied {multiplied}"


def losers(problem: Problem, tokens: int, taken: Path, gpu: Gpu) -> Losers:
    """The paths that so many tokens do not take, and why not."""
    others = (name for name in MODULES if name != taken.name)
    return tuple((name, _why_not(problem, tokens, name, taken, gpu)) for name in others)


def _why_not(problem: Problem, tokens: int, name: str, taken: Path, gpu: Gpu) -> str:
    if name == SCALED and problem.format in BLOCK_SCALED:
        return f"{gpu.name} has no mma.{BLOCK_SCALED[problem.format]}"
    refusal: str | None = MODULES[name][0].accepts(problem, gpu)
    if refusal is not None:
        return refusal
    if name == ONE and tokens > 1:
        return "takes one token"
    if name == FEW and tokens > moe_gate_up_few.MAX_TOKENS:
        return f"takes up to {moe_gate_up_few.MAX_TOKENS} tokens"
    if _chosen(problem, tokens, gpu).name == name:
        return taken.why.partition("; instead of ")[2] or "was vetoed"
    if not taken.why.startswith("default"):
        return f"{TUNED}.json names {taken.name}"
    if name == ONE:
        return "only a measurement chooses it"
    return f"rule: {_rule(problem, gpu)}, {RULE}"


def _rule(problem: Problem, gpu: Gpu) -> str:
    """Of `stock_path`."""
    first = _block_scaled.native_from(problem, gpu)
    further = f", block-scaled from {first}" if first < _block_scaled.NEVER else ""
    return f"few up to {FEW_UNMEASURED} tokens{further}"


def requests(problem: Problem, tokens: int, path: Path, gpu: Gpu) -> dict[str, CompileRequest]:
    """Every compile that so many tokens launch, by the name of its operation."""
    if path.name == ONE:
        first = moe_gate_up_one.request(problem, path.gate_up, gpu, interpreted=INTERPRETED)
        second = moe_down_one.request(problem, path.down, gpu, interpreted=INTERPRETED)
        return {"moe_gate_up": first, "moe_down": second}
    if path.name == FEW:
        # One token's programs are few: where others wait beside them, they crowd on some multiprocessors.
        late = tokens == 1 and path.down.depth > 0
        apart = moe_down_few.adds_apart(path.down, tokens)
        counted = apart and path.down.depth > 0 and "pdl" in gpu.facts
        how = {"late": late, "counted": counted, "interpreted": INTERPRETED}
        found = {
            f"moe_{part}": module.request(problem, tokens, getattr(path, part), gpu, **how)
            for part, module in zip(("gate_up", "down"), MODULES[FEW], strict=True)
        }
        return found | ({"moe_combine": _combine_request(problem, gpu, counted=counted)} if apart else {})
    sort = moe_sort.Problem(problem.experts, path.block)
    rounds = moe_gate_up.quantised(problem) and not problem.normed
    beside = path.name == SORTED and (rounds or problem.arranged)
    counted = path.name == SORTED and path.block <= COUNTED_UP_TO and "pdl" in gpu.facts
    count, place = moe_sort.requests(sort, gpu, beside=beside, counted=counted, interpreted=INTERPRETED)
    found = {"moe_count": count, "moe_place": place}
    if rounds:
        rows = quantise_fp8.Problem(problem.hidden, moe_gate_up.x_group(problem), problem.dtype)
        found["quantise_fp8"] = quantise_fp8.request(rows, gpu, interpreted=INTERPRETED)
    if path.name == SCALED:
        return found | _scaled_requests(problem, path, gpu)
    if problem.arranged:
        columns = moe_arrange.Problem(problem.hidden, problem.group, problem.dtype)
        found["moe_arrange"] = moe_arrange.request(columns, gpu, interpreted=INTERPRETED)
    how = {"block": path.block, "counted": counted, "interpreted": INTERPRETED}
    return found | {
        "moe_gate_up": moe_gate_up.request(problem, path.gate_up, gpu, **how),
        "moe_down": moe_down.request(problem, path.down, gpu, **how),
        "moe_combine": _combine_request(problem, gpu),
    }


def _scaled_requests(problem: Problem, path: Path, gpu: Gpu) -> dict[str, CompileRequest]:
    kind = _block_scaled.kind_of(problem)
    x, h = (
        quantise_groups.Problem(columns, kind, problem.dtype) for columns in (problem.hidden, problem.inter)
    )
    return {
        "quantise_x": quantise_groups.request(x, gpu, interpreted=INTERPRETED),
        "moe_gate_up": moe_gate_up_scaled.request(
            problem, path.gate_up, gpu, block=path.block, interpreted=INTERPRETED
        ),
        "quantise_h": quantise_groups.request(h, gpu, interpreted=INTERPRETED),
        "moe_down": moe_down_scaled.request(
            problem, path.down, gpu, block=path.block, interpreted=INTERPRETED
        ),
        "moe_combine": _combine_request(problem, gpu),
    }


def _combine_request(problem: Problem, gpu: Gpu, *, counted: bool = False) -> CompileRequest:
    sums = moe_combine.Problem(problem.hidden, problem.top_k, problem.dtype, problem.residual)
    return moe_combine.request(sums, gpu, experts=problem.experts if counted else 0, interpreted=INTERPRETED)


def like(problem: Problem, tokens: int, path: Path) -> int:
    """The number of tokens whose compiles these share, so that each is made once."""
    if path.name != FEW or tokens == 1:
        return tokens if path.name == FEW else 1
    few = moe_gate_up_few
    alike = (n for n in (few.padded(tokens), tokens) if few.mode(problem, n) == few.mode(problem, tokens))
    return next(alike)


@_tuned.cached
def settled_path(problem: Problem, tokens: int, gpu: Gpu) -> Path:
    """`path_of`, until tuned files or vetoes change."""
    return path_of(problem, tokens, gpu)


def rounds_at(problem: Problem, tokens: int, gpu: Gpu) -> bool:
    """Does the path of so many tokens round activations to FP8 before the first half?"""
    return moe_gate_up.quantised(problem) and settled_path(problem, tokens, gpu).name == SORTED


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many tokens launch, for the plan."""
    path = settled_path(problem, tokens, gpu)
    return _made(problem, like(problem, tokens, path), path, losers(problem, tokens, path, gpu), gpu)


def nearest_fit(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """The same with the nearest tiles that fit, where there are such; for who asks what would."""
    path = settled_path(problem, tokens, gpu)
    alike = like(problem, tokens, path)
    if path.name != ONE:
        path = _fitted(problem, alike, path, gpu, limit_bytes(gpu))
    return _made(problem, alike, path, (), gpu)


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py: all of few tokens, then those of the measurements and of `stock_path`."""
    yield from range(1, max(moe_gate_up_few.MAX_TOKENS, FEW_UNMEASURED) + 2)
    yield _wide_from(problem)
    yield _block_scaled.native_from(problem, gpu)
    yield from _tuned.turns(gpu.name, TUNED, key(problem))


@functools.cache
def _made(problem: Problem, tokens: int, path: Path, others: Losers, gpu: Gpu) -> Made:
    configs = {"moe_gate_up": path.gate_up, "moe_down": path.down}
    found, choice = requests(problem, tokens, path, gpu), choice_of(problem, path)
    compiles = (Compile(op, request, configs.get(op), choice=choice) for op, request in found.items())
    return Made(path.name, path.why, tuple(compiles), others)
