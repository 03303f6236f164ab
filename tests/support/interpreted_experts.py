"""Runs the expert kernels of one weight format under Triton's interpreter, on the CPU, in float16, and prints
their errors as JSON: [case, relative error, …]. A process of its own, because Triton decides when it is
imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_experts FORMAT [COLUMNS OF A GROUP [LAYOUT]]

LAYOUT: panels, or padded, in which the last panel is partly empty.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.formats import layouts
from firebox.hardware.base import find_gpu
from firebox.kernels import (
    _experts,
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
from firebox.kernels._block_scaled import KINDS, Rounded
from firebox.kernels._experts import FP8, MXFP4, Problem, Weights, operand
from firebox.kernels._words import factor_of_code, scales_of_codes
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.experts import WIDE, random_routing, random_weights, relative_error

GPU = find_gpu("gb10")
NAN = float("nan")
BLOCK = 16
ASKED = sys.argv[2:] if __name__ == "__main__" else []
GROUP = int(ASKED[0]) if ASKED else 32
PANELS = bool(ASKED[1:])
if ASKED[1:] == ["padded"]:
    layouts.PANELS_EMPTY = 1.0  # 192 columns are two panels of 128
# One rounding to float16 (2⁻¹² at most, 1.4 · 10⁻⁴ RMS of it) of h or of the output; a 4-bit weight times its
# scale once more.
LIMIT = 5e-4
# The interpreter truncates where the GPU rounds to E4M3: 2⁻³ at most, 0.06 RMS.
FP8_LIMIT = 7e-2


def beyond(format: str, errors: dict[str, float]) -> dict[str, float]:
    """The cases whose error is not below its limit."""
    rounded = {case for case in errors if format in FP8 and "sorted" in case and "gate_up" in case}
    return {case: e for case, e in errors.items() if not e < (FP8_LIMIT if case in rounded else LIMIT)}


def problem(format: str, hidden: int, inter: int, experts: int) -> Problem:
    clamped = {"activation": "clamped_swiglu", "biases": True} if format in MXFP4 else {}
    return Problem(
        hidden, inter, experts, 3, format, dtype="f16", int4_columns=GROUP, panels=PANELS, **clamped
    )


def in_depths(config: Any, p: Problem, columns: int) -> Any:
    """Of panels of 128 columns half a one at a time; of narrower ones, as by default, two or one."""
    return replace(config, depth=64) if p.panel(columns) == 128 and p.group <= 64 else config


def in_units(p: Problem, config: Any, columns: int) -> dict[str, Any]:
    """Where a unit is more than a group, the same tile in steps of one and of two that divide `columns`."""
    sizes = (p.unit, 2 * p.unit) if p.unit > p.group else ()
    fitting = (size for size in sizes if p.stored(columns) % size == 0)
    return {f" {size} columns": replace(config, depth=size) for size in fitting}


def unspread(config: Any) -> Any:
    """The same tile of tokens that are columns of their own."""
    return replace(config, tokens=max(config.tokens, moe_gate_up_few.COLUMNS_UP_TO))


def spread(p: Problem, config: Any, depth: int) -> dict[str, Any]:
    """The same tile of so few tokens that groups of its `depth` columns have columns of their own; of whole
    units, if that is more."""
    if p.group == 0:
        return {}
    deep = max(depth, p.unit)
    least = max(1, moe_gate_up_few.COLUMNS_UP_TO * p.group // deep)
    wide = replace(config, depth=deep) if config.depth else config
    return {f" spread {n}": replace(wide, tokens=n) for n in (least, 2 * least) if n < 8}


def in_a_row(p: Problem, config: Any) -> dict[str, Any]:
    """Two and four of the same tiles in a program, or as near to that as its columns allow."""
    depth = max(d for d in _experts.pipeline_depths(p.inter, p, remainder=False) if d <= config.depth)
    return {f" {n} tiles": replace(config, depth=depth, tiles=n) for n in (2, 4)}


def shared_last(ids: torch.Tensor, p: Problem) -> torch.Tensor:
    """The choices, but that the last expert is every token's."""
    ids = ids.clone()
    ids[:, -1] = torch.where((ids == p.experts - 1).any(1), ids[:, -1], p.experts - 1)
    return ids


def programs_with_work(p: Problem, ids: torch.Tensor, tile: moe_gate_up_few.Config) -> torch.Tensor:
    """[experts] int32: how many programs of the first half an expert has."""
    counts = torch.bincount(ids.flatten(), minlength=p.experts)
    if moe_gate_up_few.mode(p, len(ids)) == "experts":
        counts = torch.ones_like(counts)
        counts[-1] = len(ids)
    return (-(-counts // tile.tokens) * (2 * p.inter // tile.rows)).int()


def few(
    p: Problem, tokens: int, gate_up: Weights, down: Weights, generator: torch.Generator, *, shared: bool
) -> dict[str, float]:
    ids, weights = random_routing(p, tokens, generator)
    if shared:
        ids = shared_last(ids, p)
    x = torch.randn(tokens, p.hidden, generator=generator).half()
    wanted = moe_gate_up_few.reference(p, x, gate_up, ids)
    found = {}
    config = unspread(in_depths(moe_gate_up_few.default(p, tokens, GPU), p, p.hidden))
    varied = not shared and tokens <= 64  # of more tokens each takes long
    further = {**spread(p, config, config.depth), **in_units(p, config, p.hidden)} if varied else {}
    for name, tile in {"": config, **further}.items():
        h = torch.full((tokens * p.top_k, p.inter), NAN, dtype=torch.float16)
        table = torch.full(
            (moe_gate_up_few.programs(p, tokens), 1 + moe_gate_up_few.padded(tokens)), -1, dtype=torch.int32
        )
        ready = torch.zeros(p.experts, dtype=torch.int32)
        launcher = Launcher(moe_gate_up_few.request(p, tokens, tile, GPU, counted=True, interpreted=True))
        moe_gate_up_few.run(launcher, p, x, gate_up, ids, h, table, ready)
        assert torch.equal(ready, programs_with_work(p, ids, tile)), f"{tokens}{name}: {ready}"
        found[f"few {tokens} gate_up{name}"] = relative_error(h, wanted)
    wanted = moe_down_few.reference(p, h, down, ids, weights)
    ready, first_half = programs_with_work(p, ids, config), config
    config = unspread(in_depths(moe_down_few.default(p, tokens, GPU), p, p.inter))
    tiles = {"": config}
    if varied:
        tiles |= spread(p, config, config.depth) | in_a_row(p, config) | in_units(p, config, p.inter)
    if tokens <= moe_gate_up_few.COLUMNS_UP_TO:
        whole = moe_down_few.Config(rows=config.rows, depth=0, warps=config.warps)
        tiles |= {" whole": whole, " apart": replace(config, apart=True)}
        if tokens == 1:
            wide = triton.next_power_of_2(p.inter)
            tiles |= {f" whole{name}": tile for name, tile in spread(p, whole, wide).items()}
    for name, tile in tiles.items():
        out = torch.full((tokens + 1, p.hidden), NAN, dtype=torch.float16)
        out[-1] = 7.0
        apart = moe_down_few.adds_apart(tile, tokens)
        launcher = Launcher(moe_down_few.request(p, tokens, tile, GPU, counted=apart, interpreted=True))
        half = (launcher, p, h, down, ids, weights, table)
        if apart:
            products = torch.full((tokens * p.top_k, p.hidden), NAN, dtype=torch.float16)
            moe_down_few.run(*half, products, ready=ready, first_half=first_half)
            out[:-1] = products.float().unflatten(0, (tokens, p.top_k)).sum(1)
        else:
            counters = torch.zeros(p.hidden // tile.rows, dtype=torch.int32)
            moe_down_few.run(*half, torch.full((tokens * p.top_k, p.hidden), NAN), out[:-1], counters)
            assert not counters.any()
        assert (out[-1] == 7.0).all()
        found[f"few {tokens} down{name}"] = relative_error(out[:-1], wanted)
    return found


def one(p: Problem, gate_up: Weights, down: Weights, generator: torch.Generator) -> dict[str, float]:
    """One token's own kernels, in small tiles and large ones; the second half adds to what is there."""
    p = replace(p, residual=True)
    ids, weights = random_routing(p, 1, generator)
    x = torch.randn(1, p.hidden, generator=generator).half()
    found = {}
    across = moe_gate_up_one.across(p, moe_gate_up_one.Config(1, 4))
    for rows in (1, 8):
        h = torch.full((p.top_k + 1, p.inter), NAN, dtype=torch.float16)
        h[-1] = 7.0
        config = moe_gate_up_one.Config(max(rows, across), 4)
        launcher = Launcher(moe_gate_up_one.request(p, config, GPU, interpreted=True))
        moe_gate_up_one.run(launcher, p, x, gate_up, ids, h)
        assert (h[-1] == 7.0).all()
        wanted = moe_gate_up_one.reference(p, x, gate_up, ids)
        found[f"one gate_up {rows}"] = relative_error(h[:-1], wanted)
        out = torch.randn(2, p.hidden, generator=generator).half()
        before, out[-1] = out[:1].float(), 7.0
        config = moe_down_one.Config(rows, 4)
        launcher = Launcher(moe_down_one.request(p, config, GPU, interpreted=True))
        moe_down_one.run(launcher, p, h, down, ids, weights, out[:1])
        assert (out[-1] == 7.0).all()
        wanted = before + moe_down_one.reference(p, h[:-1], down, ids, weights)
        found[f"one down {rows}"] = relative_error(out[:1], wanted)
    return found


def some_narrow(p: Problem) -> torch.Tensor:
    """Choices of 40 tokens: experts with 40, 32 and 8 of them, of which a tile of 64 is narrow for two."""
    ids = torch.arange(p.top_k, dtype=torch.int32).repeat(40, 1)
    ids[32:, 1] = p.top_k
    return ids


def sorted_(
    p: Problem,
    tokens: int,
    gate_up: Weights,
    down: Weights,
    generator: torch.Generator,
    *,
    block: int = BLOCK,
    chosen: torch.Tensor | None = None,
) -> dict[str, float]:
    """Every kind of tile of BLOCK choices, or the usual one of a larger `block`. `chosen`: not drawn."""
    ids, weights = random_routing(p, tokens, generator)
    ids = ids if chosen is None else chosen
    name_of_all = f"sorted {tokens}" + " narrow" * (block > BLOCK)
    order, blocks = in_order(p, ids, block)
    x = torch.randn(tokens, p.hidden, generator=generator).half()
    exact, x_scale, h_scale, group = x.float(), None, None, moe_gate_up.inner_group(p)
    native = moe_gate_up.quantised(p)
    if native:
        rows = quantise_fp8.Problem(p.hidden, moe_gate_up.x_group(p), "f16")
        x_scale = torch.full_like(quantise_fp8.reference(rows, x)[1], NAN)
        q = torch.full(x.shape, NAN, dtype=torch.float8_e4m3fn)
        quantise_fp8.run(Launcher(quantise_fp8.request(rows, GPU, interpreted=True)), x, q, x_scale)
        groups = q.float().unflatten(-1, (-1, rows.group or p.hidden))
        exact = (groups * x_scale.view(*groups.shape[:2], 1)).flatten(-2)
        h_scale = torch.full((ids.numel(), p.inter // group), NAN)
        x = q
    if p.arranged:
        columns = moe_arrange.Problem(p.hidden, p.group, "f16")
        arranged = torch.full_like(x, NAN)
        moe_arrange.run(Launcher(moe_arrange.request(columns, GPU, interpreted=True)), x, arranged)
        assert torch.equal(arranged, moe_arrange.reference(columns, x))
        x = arranged
    found = {}
    wanted = moe_gate_up.reference(p, exact, gate_up, ids, order)
    config = in_depths(moe_gate_up.default(p, block, GPU), p, p.hidden)
    # rows are half a scale of h
    fitting = rescaled(p, config) if config.rows == 256 and block == BLOCK else {}
    for name, tile in {**fitting, **in_units(p, config, p.hidden), "": config}.items():
        h = torch.full((ids.numel(), p.inter), NAN, dtype=x.dtype)
        ready = torch.zeros(len(blocks), dtype=torch.int32)
        launcher = Launcher(moe_gate_up.request(p, tile, GPU, counted=True, interpreted=True))
        moe_gate_up.run(launcher, p, x, x_scale, gate_up, order, blocks, h, h_scale, ready)
        parts = -(-2 * p.inter // tile.rows) * -(-blocks[:, 2] // tile.tokens)
        assert torch.equal(ready, parts.int()), "programs counted wrongly"
        inner = h.float()
        if p.arranged:
            inner = torch.empty_like(inner).index_copy_(1, layouts.arranged_columns(p.inter, p.group), inner)
        if h_scale is not None:
            inner = (h.float().unflatten(-1, (-1, group)) * h_scale.unsqueeze(-1)).flatten(-2)
        found[f"{name_of_all} gate_up{name}"] = relative_error(inner, wanted)
    first_half, config = config, in_depths(moe_down.default(p, block, GPU), p, p.inter)
    wanted = moe_down.reference(p, inner, down, ids, order, weights)
    in_a_row = replace(config, tiles=2)
    held = {" 2 tiles held": replace(in_a_row, held=True)} if moe_down.can_hold(p, config.depth) else {}
    of_steps = {
        **rescaled(p, config),
        **rescaled(p, in_a_row, " 2 tiles"),
        **rescaled(p, replace(in_a_row, held=True), " 2 tiles held"),
    }
    many = (
        {" 2 tiles": in_a_row, **held, **of_steps, **in_units(p, config, p.inter)} if block == BLOCK else {}
    )
    for name, tile in {**many, "": config}.items():
        y = torch.full((ids.numel(), p.hidden), NAN, dtype=torch.float16)
        launcher = Launcher(moe_down.request(p, tile, GPU, counted=True, interpreted=True))
        moe_down.run(launcher, p, h, h_scale, down, order, blocks, weights, y, ready, first_half)
        found[f"{name_of_all} down{name}"] = relative_error(y, wanted)
    sums = moe_combine.Problem(p.hidden, p.top_k, "f16")
    out = torch.full((tokens, p.hidden), NAN, dtype=torch.float16)
    ready = torch.full((p.experts + 1,), int(tokens > 0), dtype=torch.int32)  # without tokens nobody counts
    ready[-1] = 1
    launcher = Launcher(moe_combine.request(sums, GPU, experts=p.experts, interpreted=True))
    moe_combine.run(launcher, y, out, ready)
    assert not ready[:-1].any() and ready[-1] == 1, f"not zero again, or beyond: {ready}"
    return found | {f"{name_of_all} combine": relative_error(out, moe_combine.reference(sums, y))}


def rescaled(p: Problem, config: Any, name: str = "") -> dict[str, Any]:
    """The tile, in FP8, with so many sums a thread that these are in units of each step's scales."""
    tile = replace(config, rows=256, flip=True, warps=1)
    is_it = moe_gate_up.quantised(p) and moe_gate_up.rescaled(tile, every_step=True)
    assert is_it or p.format != "fp8_block", f"too few: {tile}"
    return {f"{name} rescaled": tile} if is_it else {}


def in_order(p: Problem, ids: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """`order` and `blocks` of moe_sort, looked over."""
    sort = moe_sort.Problem(p.experts, block)
    guarded_order = torch.full((ids.numel() + 1,), -1, dtype=torch.int32)
    guarded_blocks = torch.full((moe_sort.most_blocks(sort, ids.numel()) + 1, 3), -7, dtype=torch.int32)
    order, blocks = guarded_order[:-1], guarded_blocks[:-1]
    requests = moe_sort.requests(sort, GPU, counted=True, interpreted=True)
    count, place = (Launcher(request) for request in requests)
    scratch, ready = moe_sort.scratch(sort, "cpu"), torch.full((len(guarded_blocks),), -1, dtype=torch.int32)
    moe_sort.run((count, place), ids, scratch, order, blocks, ready[:-1])
    assert not ready[:-1].any() and ready[-1] == -1, f"not zero, or behind the end: {ready}"
    assert not scratch.counts.any() and not scratch.ended.any(), "not ready for a second time"
    assert guarded_order[-1] == -1 and (guarded_blocks[-1] == -7).all(), "behind the end was written"
    of_expert, wanted_blocks = moe_sort.reference(sort, ids)
    assert [tuple(entry) for entry in blocks.tolist() if entry[2]] == wanted_blocks
    for places, found in zip(of_expert, order.split([len(places) for places in of_expert]), strict=True):
        assert sorted(found.tolist()) == places, "choices of another expert"
    return order, blocks


def rounded(kind: str, x: torch.Tensor) -> tuple[Rounded, torch.Tensor]:
    """`x` through quantise_groups, and what was meant."""
    p = quantise_groups.Problem(x.shape[1], kind, "f16")
    to = quantise_groups.empty(p, x.shape[0], "cpu")
    for part in (to.q, to.scales, to.row_scale):
        if part is not None:
            part.view(torch.uint8).fill_(0xFF)  # NaN, or the highest code
    quantise_groups.run(Launcher(quantise_groups.request(p, GPU, interpreted=True)), x, to)
    return to, quantise_groups.dequantised(p, to)


def alone(
    p: Problem, tokens: int, gate_up: Weights, down: Weights, generator: torch.Generator
) -> dict[str, float]:
    """All tokens choose one expert and nothing else; and no tokens do."""
    p, last = replace(p, top_k=1), torch.full((tokens, 1), p.experts - 1, dtype=torch.int32)
    layer = gate_up, down, generator
    found = few(p, tokens, *layer, shared=True) | sorted_(p, tokens, *layer, chosen=last)
    return {f"{case} alone": error for case, error in (found | sorted_(p, 0, *layer)).items()}


def scaled(
    p: Problem, kind: str, tokens: int, gate_up: Weights, down: Weights, generator: torch.Generator
) -> dict[str, float]:
    """Block-scaled products of what was rounded before: only h and the output are rounded again."""
    ids, weights = random_routing(p, tokens, generator)
    order, blocks = in_order(p, ids)
    given, exact = rounded(kind, torch.randn(tokens, p.hidden, generator=generator).half())
    h = torch.full((ids.numel(), p.inter), NAN, dtype=torch.float16)
    config = moe_gate_up_scaled.default(p, BLOCK, GPU)
    request = moe_gate_up_scaled.request(p, config, GPU, kind=kind, interpreted=True)
    moe_gate_up_scaled.run(Launcher(request), p, given, gate_up, order, blocks, h)
    wanted = moe_gate_up_scaled.reference(p, exact, gate_up, ids, order)
    found = {f"{kind} {tokens} gate_up": relative_error(h, wanted)}
    given, exact = rounded(kind, h)
    y = torch.full((ids.numel(), p.hidden), NAN, dtype=torch.float16)
    config = moe_down_scaled.default(p, BLOCK, GPU)
    request = moe_down_scaled.request(p, config, GPU, kind=kind, interpreted=True)
    moe_down_scaled.run(Launcher(request), p, given, down, order, blocks, weights, y)
    wanted = moe_down_scaled.reference(p, exact, down, ids, order, weights)
    return found | {f"{kind} {tokens} down": relative_error(y, wanted)}


@triton.jit
def both_kinds_of_scales(packed, of_sums, of_weights, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    these = tl.load(packed + i)
    found = scales_of_codes(these, tl.bfloat16, True)
    for j in tl.static_range(4):
        tl.store(of_sums + 4 * i + j, factor_of_code(these, j, True))
        tl.store(of_weights + 4 * i + j, found[j].to(tl.float32))


def check_packed_scales() -> None:
    """What a GPU makes of packed E8M0 scales by moving bits: 2^(code − 127), for weights 2¹²⁶ times it."""
    codes = torch.arange(1, 129, dtype=torch.uint8)[torch.randperm(128)]
    of_sums, of_weights = torch.empty(2, 128)
    both_kinds_of_scales[(1,)](codes.view(torch.int32), of_sums, of_weights, 32)
    exponents = codes.float() - 127
    assert torch.equal(of_sums, torch.exp2(exponents)) and torch.equal(
        of_weights, torch.exp2(exponents + 126)
    )


def main(format: str) -> None:
    quick_interpreter.begin()
    check_packed_scales()
    unit = 128 if format == "fp8_block" else max(64, GROUP)
    generator, found = torch.Generator().manual_seed(0), {}
    # one, columns and pairs; then, with fewer experts, experts; odd numbers of tiles either way
    for hidden, inter, experts, few_tokens, many in (
        (3 * unit, 2 * unit, 28, (1, 3, 9), ()),
        (2 * unit, 3 * unit, 6, (10, 66) if format in WIDE else (10,), (2, 31)),
    ):
        p = problem(format, hidden, inter, experts)
        gate_up = random_weights(p, 2 * inter, hidden, generator)
        down = random_weights(p, hidden, inter, generator)
        size = f"{hidden} × {inter} × {experts}: "
        found |= {size + case: error for case, error in one(p, gate_up, down, generator).items()}
        for tokens in few_tokens:
            for shared in (False, True) if tokens > 8 else (False,):
                errors = few(p, tokens, gate_up, down, generator, shared=shared)
                found |= {size + case + " shared" * shared: error for case, error in errors.items()}
        for tokens in many:
            found |= {
                size + case: error for case, error in sorted_(p, tokens, gate_up, down, generator).items()
            }
        if many:
            errors = sorted_(p, 40, gate_up, down, generator, block=64, chosen=some_narrow(p))
            found |= {size + case: error for case, error in errors.items()}
        if many and format in WIDE:
            errors = alone(p, 17, gate_up, down, generator)
            found |= {size + case: error for case, error in errors.items()}
        for tokens in many:
            for kind in KINDS.get(format, ()):
                errors = scaled(p, kind, tokens, gate_up, down, generator)
                found |= {size + case: error for case, error in errors.items()}
    print(json.dumps({"operand": operand(p), "errors": found}))


if __name__ == "__main__":
    main(sys.argv[1])
