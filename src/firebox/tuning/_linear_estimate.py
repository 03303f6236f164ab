"""How long a dense linear layer should take: tuning/estimate.py's bounds, for products of one matrix.

    one      the memory's time, whatever the tile
    few      its program, one expert, whose columns are divided too; what the slices cost is added
    many     the tiles of a product in which no tile is emptier than it must be, columns divided as well
    cublas   a launch, and a fixed share of the roof, of an FP8 product the same one: no such was measured

The numbers in RATES were fitted to the 36 entries of tuned/nvidia_h200/linear.json, within 28 % of each. They
are winners: of a tile that is far from the best they say little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from firebox.hardware.base import Gpu
from firebox.kernels import _linear, linear, linear_few
from firebox.kernels._linear import Problem
from firebox.kernels.compile import Compiled
from firebox.tuning import estimate
from firebox.tuning.estimate import Product, Tile, norm, read_rate, resident_blocks, step_parts, tflop_s


@dataclass(frozen=True)
class Rates:
    """What was fitted, on an H200; a product's own rates are those of tuning/estimate.py, but `read`. In
    microseconds: `begin` of a launch, `program` of a program, `slices` of adding up; `own`: a launch of
    cuBLAS, `term` of adding another one to its product. `roof`: the share that cuBLAS reaches."""

    read: float = 0.968
    begin: float = 0.5
    program: float = 1.65
    latency: float = 0.815
    slices: float = 1.72
    own: float = 4.2
    term: float = 3.2
    roof: float = 0.8


RATES = Rates()


def product(p: Problem, tokens: int, *, few: bool) -> Product:
    """The layer as a product of one expert that has all tokens."""
    rounds = not few and linear.quantised(p)
    weights = p.rows * p.columns
    return Product(
        few=few,
        rows=p.rows,
        columns=p.columns,
        experts=1,
        all_experts=1,
        choices=tokens,
        launched=0,
        weight_bytes=_linear.total_bytes(p) / weights,
        x_bytes=1 if rounds else 2,
        out_bytes=(4 if p.out_dtype == "f32" else 2) + 2 * p.residual,
        fp8=rounds,
        blocked=p.format == "fp8_block",
    )


def few_us(
    p: Problem, tokens: int, config: linear_few.Config, compiled: Compiled | None, gpu: Gpu,
    rates: Rates = RATES,
) -> float:  # fmt: skip
    """Of kernels/linear_few.py, in microseconds."""
    q, wide = product(p, tokens, few=True), linear_few.padded(tokens)
    steps, slices = linear_few.division(p, config)
    tile = _tile(q, config.rows, wide, config, compiled)
    programs = -(-p.rows // config.rows) * slices
    found = _us(q, tile, (config.head / config.depth, steps), programs, gpu, rates)
    if slices == 1:
        return found
    return found + rates.slices + 2 * _sums_us(slices * tokens * p.rows, gpu)


def one_us(p: Problem, gpu: Gpu, rates: Rates = RATES) -> float:
    """Of kernels/linear_one.py, in microseconds. Tiles are told apart by measuring them."""
    moved_us = _moved(product(p, 1, few=True)) / (read_rate(gpu) * rates.read)
    return rates.begin + rates.program + rates.latency + moved_us


def many_us(
    p: Problem, tokens: int, config: linear.Config, compiled: Compiled | None, gpu: Gpu,
    rates: Rates = RATES,
) -> float:  # fmt: skip
    """Of kernels/linear.py alone, in microseconds."""
    q = product(p, tokens, few=False)
    tile = _tile(q, config.rows, config.tokens, config, compiled)
    (steps, slices), tiles = linear.division(p, config), linear.tiles_of(p, tokens, config)
    found = _us(q, tile, (0, steps), tiles * slices, gpu, rates)
    if slices == 1:
        return found
    waves = -(-tiles // gpu.sms)  # of the programs that add up, each on a multiprocessor of its own
    read = waves * gpu.sms * slices * min(tokens, config.tokens) * config.rows
    return found + rates.slices + _sums_us(slices * tokens * p.rows, gpu) + _sums_us(read, gpu)


def cublas_us(p: Problem, tokens: int, gpu: Gpu, rates: Rates = RATES) -> float:
    """Of torch.mm or addmm, which adds one of bias and residual at no cost, or of torch._scaled_mm, which
    adds a bias; what is left is a launch. Without the rounding to FP8."""
    terms = p.bias + p.residual - (p.out_dtype != "f32" and p.bias + p.residual > 0)
    if linear.quantised(p):
        terms = int(p.residual)
    return rates.own + roof_us(p, tokens, gpu, few=False) / rates.roof + rates.term * terms


def roof_us(p: Problem, tokens: int, gpu: Gpu, *, few: bool) -> float:
    """The least time: what must be read and written once, or the product, at the GPU's best rates."""
    q = product(p, tokens, few=few)
    return max(_moved(q) / read_rate(gpu), 2 * tokens * p.rows * p.columns / (tflop_s(q, gpu) * 1e6))


def rounding_us(p: Problem, tokens: int, gpu: Gpu, rates: Rates = RATES) -> float:
    """Of kernels/quantise_fp8.py: two bytes are read and one is written."""
    return rates.begin + rates.latency + 3 * tokens * p.columns / (read_rate(gpu) * rates.read)


def _tile(
    q: Product, rows: int, wide: int, config: linear_few.Config | linear.Config, compiled: Compiled | None
) -> Tile:
    """As estimate.tile_of, of which the rest is a guess where nothing is compiled."""
    stages, depth = config.stages, config.depth
    shape = (rows, wide, depth, config.warps, stages, config.tma, 1)
    if compiled is not None:
        return Tile(*shape, compiled.shared_bytes, compiled.registers, compiled.spill_bytes)
    loads = depth * (rows * q.weight_bytes + wide * q.x_bytes)
    sums = rows * wide / (estimate.WARP * config.warps)
    head = getattr(config, "head", 0) * rows * q.weight_bytes / 4 / (estimate.WARP * config.warps)
    return Tile(*shape, int((stages - 1) * loads), int(min(255, 40 + 1.5 * sums + head)), 0)


def _us(q: Product, tile: Tile, division: tuple[float, int], programs: int, gpu: Gpu, rates: Rates) -> float:
    """`division`: the head, in steps, and the steps behind it."""
    (head, steps), power = division, estimate.RATES.power
    of_sm = read_rate(gpu) * rates.read / gpu.sms
    alu, mma, loads = step_parts(q, tile, gpu, estimate.RATES, of_sm)
    work = (alu + mma) / min(1.0, tile.warps / 4)  # of a multiprocessor's four schedulers
    chain = max(rates.latency / max(1, tile.stages - 1), estimate.RATES.step + work)
    ends = tile.rows * tile.width * q.out_bytes / (of_sm * estimate.RATES.store)
    of_each_sm, resident = programs / gpu.sms, resident_blocks(tile, gpu)
    waves = max(1.0, of_each_sm / resident)
    if waves < estimate.SMOOTH_WAVES:
        waves = math.ceil(waves - 0.02)
    seen = 1.0 - _hidden(of_each_sm, resident, gpu)
    alone = waves * (steps * chain + head * work + ends + rates.program * seen)
    busy = of_each_sm * ((head + steps) * norm(power, loads, alu, mma) + ends / 2)
    return rates.begin + norm(power, _moved(q) / (read_rate(gpu) * rates.read), busy, alone)


def _sums_us(numbers: int, gpu: Gpu) -> float:
    """Writing or reading partial sums, which lie in the L2, by all multiprocessors."""
    return 4 * numbers / (read_rate(gpu) * estimate.RATES.l2)


def _hidden(of_each_sm: float, resident: int, gpu: Gpu) -> float:
    """The share of programs for which there is room while the launch before ends: these begin, and load
    their heads, behind it."""
    room = resident - math.ceil(of_each_sm)
    return min(1.0, max(0.0, room / math.ceil(of_each_sm))) if "pdl" in gpu.facts else 0.0


def _moved(q: Product) -> float:
    """Bytes that must be read and written once."""
    return q.rows * q.columns * q.weight_bytes + q.choices * (q.rows * q.out_bytes + q.columns * q.x_bytes)
