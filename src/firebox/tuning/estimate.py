"""How long a tile should take, from what is known without a GPU: bytes, products, programs, and what the
compiler made of it (registers and shared memory, which say how many programs a multiprocessor holds).

Three bounds, added up as a norm: the memory's, over all bytes once; a multiprocessor's, over the loads, ALU
work and products of all its programs; and the programs' own, wave after wave, each a chain of pipeline steps
that cannot be shorter than a load's latency over the stages, nor than its warps' share of the ALUs and tensor
cores allows.

The numbers in RATES were fitted to an exhaustive search over three expert layers on an H200; how far wrong
the estimate is there and on other layers stands in docs/log/2026-11-21-tuning.md. For other GPUs it scales
with their own rates: that has not been measured.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import _block_scaled, _experts, moe_gate_up_few
from firebox.kernels._experts import FP8, Problem
from firebox.kernels.compile import Compiled
from firebox.kernels.moe_gate_up_few import COLUMNS_UP_TO

WARP = 32
MOST_BLOCKS = 32  # of a multiprocessor
DRIVER_BYTES = 1024  # of shared memory, a block
SMOOTH_WAVES = 6  # from which the last wave's share does not matter
UNKNOWN_GB_S, UNKNOWN_TFLOP_S = 1000.0, 100.0
GATE_UP, FEW, SCALED = "gate_up", "few", "block-scaled"
SCALED_BYTES = {"nvf4": 0.5 + 1 / 16, "mxf4": 0.5 + 1 / 32, "mxf8": 1 + 1 / 32}  # of a rounded number


@dataclass(frozen=True)
class Rates:
    """What was fitted, on an H200. `read`, `mma`: the share of the GPU's rates that is reached; `few_mma`:
    times that for products of 8 columns; `l2`: its rate in memory's. Picoseconds that a multiprocessor takes
    for a weight: `decode` from 4 bits, `convert` from FP8, `plain` as it is. Microseconds: `begin` of a
    launch, `program` of a program, `latency` of a load, times `tma` where that is used, `step` of a pipeline
    step, `issue` of one for four warps, `idle` of a program that finds nothing to do. `store`: rate of a
    program's end in memory's; `spill`: nanoseconds a spilled byte and warp; `passes`: what a pass over
    further tokens costs beside the first; `power`: how the bounds add up (a norm: 1 a sum, ∞ the largest)."""

    read: float = 0.88
    mma: float = 0.821
    few_mma: float = 0.638
    l2: float = 2.24
    decode: float = 16.8
    convert: float = 7.13
    plain: float = 0.00816
    begin: float = 0.916
    program: float = 2.1
    latency: float = 1.35
    tma: float = 1.0
    step: float = 0.179
    issue: float = 0.0676
    idle: float = 0.387
    store: float = 1.66
    spill: float = 0.563
    passes: float = 0.786
    power: float = 3.61


RATES = Rates()
SPREAD_DECODE = 0.7  # of the instructions for a weight, where its scale multiplies sums


@dataclass(frozen=True)
class Tile:
    """What the estimate reads of a config and of its compile. `width`: of tokens; `spread`: groups of a step
    with columns of their own, 0 without; `tiles`: of rows, one after the other in a program; `depth` columns
    a step, all of them where there is no pipeline."""

    rows: int
    width: int
    depth: int
    warps: int
    stages: int
    tma: bool
    tiles: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    spread: int = 0


@dataclass(frozen=True)
class Product:
    """One launch's work. `few`: no sorting. `rows`, `columns`: of an expert's matrix;
    `experts`: how many are touched, of `all_experts`; `launched`: tiles of tokens that are launched, whether
    they find work or not. Bytes of a weight and its scale, of a number of x, of a result. `fp8`: both
    operands; `blocked`: sums are scaled step by step; `group`: columns that share a scale; `scaled`: the kind
    of a block-scaled product, "" for others."""

    few: bool
    rows: int
    columns: int
    experts: float
    all_experts: int
    choices: int
    launched: int
    weight_bytes: float
    x_bytes: float
    out_bytes: float
    fp8: bool
    blocked: bool
    group: int = 0
    scaled: str = ""

    @property
    def each(self) -> float:
        """Choices of a touched expert."""
        return self.choices / max(self.experts, 1e-9)

    def blocks(self, tile: int) -> float:
        """Tiles of `tile` choices that have any."""
        if self.few:
            return self.experts
        return _blocks(self.all_experts, self.choices, tile)


@functools.lru_cache(4096)
def _blocks(experts: int, choices: int, tile: int) -> float:
    """Σ over experts of ⌈choices / tile⌉, choices being spread evenly at random (Poisson)."""
    mean = choices / experts
    total, chance, n = 0.0, math.exp(-mean) if mean < 600 else 0.0, 0
    if chance == 0.0 or mean > 40 * tile:
        return experts * (mean / tile + 0.5)
    while n < mean + 12 * math.sqrt(mean) + 12:
        total += chance * -(-n // tile)
        n += 1
        chance *= mean / n
    return experts * total


def expert_product(p: Problem, tokens: int, path: str, part: str) -> Product:
    """The work of one half of an expert layer for so many tokens, routed at random."""
    routed = p.experts - p.shared
    experts = p.shared + routed * (1 - (1 - (p.top_k - p.shared) / routed) ** tokens)
    gate_up, few = part == GATE_UP, path == FEW
    scale = {"int4_group": 2, "int4_zero": 4}.get(p.format, 1) / p.group if p.group else 0.0
    rounds = p.format in FP8 and not few
    scaled = _block_scaled.kind_of(p) if path == SCALED else ""
    inner = 1 if rounds else 2
    return Product(
        few=few,
        rows=2 * p.inter if gate_up else p.hidden,
        columns=p.hidden if gate_up else p.inter,
        experts=experts,
        choices=tokens * p.top_k,
        weight_bytes=_experts.weight_bytes(p) + scale,
        x_bytes=SCALED_BYTES.get(scaled, inner),
        out_bytes=inner / 2 if gate_up else 4 if few and tokens <= COLUMNS_UP_TO else 2,
        fp8=rounds,
        blocked=p.format == "fp8_block",
        group=p.group,
        scaled=scaled,
        all_experts=p.experts,
        launched=moe_gate_up_few.programs(p, tokens) if few else 0,
    )


def roof_us(p: Problem, tokens: int, path: str, gpu: Gpu) -> float:
    """The least time of a whole layer: what must be read and written once, or the products, at the GPU's best
    rates."""
    up, down = (expert_product(p, tokens, path, part) for part in (GATE_UP, "down"))
    numbers = up.rows * up.columns + down.rows * down.columns
    moved = up.experts * numbers * up.weight_bytes
    moved += 4 * tokens * p.hidden + 2 * up.choices * p.inter * down.x_bytes
    return max(moved / read_rate(gpu), 2 * up.choices * numbers / (tflop_s(up, gpu) * 1e6))


def tile_of(product: Product, config: Any, compiled: Compiled | None) -> Tile:
    """`compiled` None: shared memory and registers are guessed, well enough to say what is worth
    compiling."""
    width = config.tokens
    depth = config.depth or product.columns
    spread = depth // product.group if product.few and product.group and width < COLUMNS_UP_TO else 0
    shape = (config.rows, width, depth, config.warps, config.stages if config.depth else 2)
    further = (config.tma, getattr(config, "tiles", 1))
    if compiled is not None:
        usage = (compiled.shared_bytes, compiled.registers, compiled.spill_bytes)
        return Tile(*shape, *further, *usage, spread)
    threads = WARP * config.warps
    stored = min(2.0, product.weight_bytes if product.weight_bytes >= 1 else 0.5)
    x_bytes = width * depth * product.x_bytes
    loads = config.rows * depth * stored + (x_bytes if product.fp8 else 0)
    shared = (config.stages * loads if config.depth else 4096) + (0 if product.fp8 else x_bytes)
    sums = config.rows * width * max(1, spread) / threads * (2 if product.blocked or spread else 1)
    operands = 0 if product.fp8 else config.rows * depth / threads / (8 if config.depth else 4)
    return Tile(*shape, *further, int(shared), int(min(255, 40 + sums + operands)), 0, spread)


def tile_us(q: Product, tile: Tile, gpu: Gpu, rates: Rates = RATES) -> float:
    """The estimate in microseconds."""
    read = read_rate(gpu) * rates.read
    of_sm = read / gpu.sms
    passes = 1.0 + rates.passes * max(0.0, q.each / tile.width - 1) if q.few else 1.0
    steps = -(-q.columns // tile.depth) * tile.tiles * passes
    work = q.blocks(tile.width)
    row_tiles = -(-q.rows // (tile.rows * tile.tiles))
    alu, mma, loads = step_parts(q, tile, gpu, rates, of_sm)
    ends = tile.rows * tile.width * q.out_bytes * tile.tiles / (of_sm * rates.store)
    latency = rates.latency * (rates.tma if tile.tma else 1.0)
    share = min(1.0, tile.warps / 4)  # of a multiprocessor's four schedulers
    chain = max(latency / max(1, tile.stages - 1), rates.step + (alu + mma) / share)
    alone = steps * chain + rates.program + latency + ends
    busy = steps * norm(rates.power, loads, alu, mma) + ends / 2
    resident = resident_blocks(tile, gpu)
    of_each_sm = work * row_tiles / gpu.sms
    waves = max(1.0, of_each_sm / resident)
    if waves < SMOOTH_WAVES:
        waves = math.ceil(waves - 0.02)
    moved = q.experts * q.rows * q.columns * q.weight_bytes
    moved += q.choices * (q.rows * q.out_bytes + q.columns * q.x_bytes)
    idle = max(0.0, q.launched - work) * row_tiles / gpu.sms / resident * rates.idle
    return rates.begin + norm(rates.power, moved / read, of_each_sm * busy, waves * alone) + idle


def one_us(q: Product, gpu: Gpu, rates: Rates = RATES) -> float:
    """Of one token's own kernels, whatever the tile: the memory's time, and what a launch and a load take."""
    moved = q.experts * q.rows * q.columns * q.weight_bytes
    return rates.begin + rates.latency + moved / (read_rate(gpu) * rates.read)


def read_rate(gpu: Gpu) -> float:
    """Bytes a microsecond, the best that is known."""
    return (gpu.read_gb_s or gpu.copy_gb_s or gpu.bandwidth_gb_s or UNKNOWN_GB_S) * 1e3


def step_parts(q: Product, tile: Tile, gpu: Gpu, rates: Rates, of_sm: float) -> tuple[float, float, float]:
    """Microseconds of a multiprocessor that a step takes in its ALUs, tensor cores and loads; `of_sm`: bytes
    of memory a microsecond that are its share."""
    tensor = tflop_s(q, gpu) * 1e6 / gpu.sms * rates.mma * (rates.few_mma if q.few else 1.0)
    if q.scaled:  # multiplied as they are stored, or turned into E4M3
        each = rates.convert if q.scaled == "mxf8" else rates.plain
    elif q.weight_bytes < 1:
        each = rates.decode
    else:
        each = rates.convert if q.weight_bytes < 2 and not q.fp8 else rates.plain
    if tile.spread:
        each *= SPREAD_DECODE
    alu = tile.rows * tile.depth * each * 1e-6 + rates.issue * tile.warps / 4
    alu += rates.spill * tile.spill_bytes * tile.warps * 1e-3
    mma = 2 * tile.rows * tile.depth * tile.width * max(1, tile.spread) / tensor
    loads = tile.depth * (tile.rows * q.weight_bytes + tile.width * q.x_bytes) / (of_sm * rates.l2)
    return alu, mma, loads


def tflop_s(q: Product, gpu: Gpu) -> float:
    """The data sheet's rate for these operands."""
    if q.scaled in ("nvf4", "mxf4"):
        return gpu.fp4_tflop_s or UNKNOWN_TFLOP_S
    narrow = q.fp8 or q.scaled == "mxf8"
    return (gpu.fp8_tflop_s if narrow else gpu.bf16_tflop_s) or UNKNOWN_TFLOP_S


def resident_blocks(tile: Tile, gpu: Gpu) -> int:
    """Programs that a multiprocessor holds at once."""
    threads = WARP * tile.warps
    most = min(
        MOST_BLOCKS,
        gpu.smem_per_sm_bytes // (tile.shared_bytes + DRIVER_BYTES),
        gpu.registers_per_sm // max(1, tile.registers * threads),
        gpu.threads_per_sm // threads,
    )
    return max(1, most)


def norm(power: float, *parts: float) -> float:
    """How bounds add up: the larger `power`, the less the smaller ones count."""
    largest = max(parts)
    return float(largest * sum((part / largest) ** power for part in parts) ** (1 / power))


def sorting_us(p: Problem, tokens: int, gpu: Gpu) -> float:
    """Sorting the choices, changing the activations, and summing. Fitted to the same search."""
    changed = 3 if p.format in FP8 else 4 if p.arranged else 0
    return 4.5 + _passing_us(p, tokens, changed, gpu)


def summing_us(p: Problem, tokens: int, gpu: Gpu) -> float:
    """Summing alone."""
    return 1.4 + _passing_us(p, tokens, 0, gpu)


def _passing_us(p: Problem, tokens: int, changed: int, gpu: Gpu) -> float:
    """Memory's time for the choices' products, the sums, and `changed` bytes of each activation."""
    return 1.3 * tokens * p.hidden * (2 * p.top_k + 4 + changed) / read_rate(gpu)


def rounding_us(p: Problem, tokens: int, gpu: Gpu) -> float:
    """Rounding x and h for a block-scaled product: two launches, two bytes read and up to one written."""
    return 4.0 + 3.0 * tokens * (p.hidden + p.top_k * p.inter) / read_rate(gpu)
