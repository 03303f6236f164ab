"""How long a grouped product should take with a tile: an analytic time, to order tiles by.

A program computes block_m × block_n in ⌈k / block_k⌉ steps. As many run at a time as registers, shared bytes
and threads of the multiprocessors allow; what is more comes in further waves. Five things take time, and
overlap in part:

    memory       bytes that come from it or go to it, over its speed
    L2           bytes of all programs' tiles, in whole lines, over L2's speed
    port         those of the fullest multiprocessor, over what one can take in
    operations   of the fullest multiprocessor, padded rows included; scaling sums or unpacking int4 adds to
                 them at the rate of the ordinary units
    latency      each wave's prologue, and its steps' as far as stages do not hide it

    time = prologue + (memory³ + L2³ + port³ + operations³ + latency³)^⅓

so that the longest decides, and the others order tiles that are alike in it. Bytes that programs share come
from L2 if they are still there: weights come from memory again for another band of group_m row blocks, and
rows for further columns, once more than half of L2 has passed by.

It is a model, not a measurement. Its constants are round numbers of the right size for these GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from firebox.errors import ConfigError
from firebox.hardware.base import KIB, Gpu
from firebox.planning._foreign_kernel import Tile
from firebox.tuning.servers.products import OUT_BYTES, Product
from firebox.tuning.servers.tiles import WARP_THREADS

LATENCY_US = 0.8  # from a load to its bytes, with the memory busy
PROLOGUE_US = 2 * LATENCY_US  # rows and expert are read before the first operands are; then those
ISSUE_US = 0.06  # a step's barriers, about 150 clocks
DATASHEET_SHARE = 0.85  # of the bandwidth that reading reaches, where nobody measured it
L2_TIMES = 4  # as fast as memory
PORT_GB_S = 60  # of one multiprocessor, 32 bytes a clock
LINE_BYTES = 128  # a shorter piece of a row takes as long to fetch
VECTOR_SHARE = 1 / 8  # the ordinary units' rate, of the bf16 tensor rate
OVERLAP = 3  # the exponent: 1 adds times up, without end only the longest counts
RESERVED_BYTES = KIB  # of shared memory a block, kept by the driver
BLOCKS_PER_SM = 24


class Usage(Protocol):
    """What a tile needs of a multiprocessor: a compile knows, and an estimate."""

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        ...

    @property
    def registers(self) -> int:
        """Of a thread."""
        ...


@dataclass(frozen=True)
class _Rates:
    """Of one GPU: bytes, and of one multiprocessor tensor and ordinary operations, all in a microsecond."""

    memory: float
    tensor: float
    vector: float


def predicted_us(
    product: Product, tokens: int, tile: Tile, usage: Usage, gpu: Gpu, group_m: int = 1
) -> float:
    """Microseconds for one layer's product. Raises ConfigError for a GPU whose rates are not known."""
    rates = _rates(gpu, product.operands.instruction)
    programs = product.routing.blocks(tokens, tile.block_m) * -(-product.n // tile.block_n)
    slots, steps = gpu.sms * resident(tile, usage, gpu), -(-product.k // tile.block_k)
    waves = _waves(programs, slots)
    fullest = waves * max(1.0, min(programs, slots) / gpu.sms)  # programs of a multiprocessor
    times = (
        memory_bytes(product, tokens, tile, gpu, group_m) / rates.memory,
        programs * steps * tile_bytes(product, tile) / (rates.memory * L2_TIMES),
        fullest * steps * tile_bytes(product, tile) / (PORT_GB_S * 1e3),
        fullest * steps * _work_us(product, tile, rates),
        waves * (PROLOGUE_US + steps * max(LATENCY_US / (tile.num_stages - 1), ISSUE_US)),
    )
    longest: float = sum(time**OVERLAP for time in times) ** (1 / OVERLAP)
    return PROLOGUE_US + longest


def resident(tile: Tile, usage: Usage, gpu: Gpu) -> int:
    """Programs that a multiprocessor runs at a time; at least 1, for a block that fits."""
    threads = tile.num_warps * WARP_THREADS
    registers = -(-usage.registers // 8) * 8 * threads
    return max(
        1,
        min(
            gpu.smem_per_sm_bytes // (usage.shared_bytes + RESERVED_BYTES),
            gpu.registers_per_sm // max(1, registers),
            gpu.threads_per_sm // threads,
            BLOCKS_PER_SM,
        ),
    )


def memory_bytes(product: Product, tokens: int, tile: Tile, gpu: Gpu, group_m: int) -> float:
    """That come from memory or go there."""
    touched = product.routing.touched(tokens)
    blocks = product.routing.blocks(tokens, tile.block_m) / touched  # of one expert
    expert = product.n * product.k * product.w_bytes
    rows = tile.block_m * product.k * product.x_bytes  # of one block
    columns = -(-product.n // tile.block_n)
    experts = max(1.0, group_m / blocks)  # in a band
    band, column = experts * expert + group_m * rows, experts * expert / columns + group_m * rows
    bands = max(1.0, blocks / group_m) if band > gpu.l2_bytes / 2 else 1.0
    passes = columns if column > gpu.l2_bytes / 2 else 1
    read = touched * expert * bands + product.x_rows(tokens) * product.k * product.x_bytes * passes
    return read + product.routing.rows(tokens) * product.n * OUT_BYTES


def tile_bytes(product: Product, tile: Tile) -> float:
    """That a program loads in a step, rows in whole lines."""
    x, w = (max(LINE_BYTES, tile.block_k * size) for size in (product.x_bytes, product.w_bytes))
    return tile.block_m * x + tile.block_n * w


def _work_us(product: Product, tile: Tile, rates: _Rates) -> float:
    """What one program computes in a step, alone on its multiprocessor."""
    sums = tile.block_m * tile.block_n
    vector = 4 * sums if product.operands.scales == "block" else 0  # two multiply-adds a sum
    if product.operands.int4:
        vector += 6 * tile.block_n * tile.block_k  # shift, mask, convert, subtract, scale, convert
    return 2 * sums * tile.block_k / rates.tensor + vector / rates.vector


def _waves(programs: float, slots: int) -> float:
    """A first one, whatever is in it; of the last one half on average, for programs do not end together."""
    waves = programs / slots
    return 1.0 if waves <= 1 else waves + 0.5 * (1 - 1 / waves)


def _rates(gpu: Gpu, instruction: str) -> _Rates:
    bandwidth = gpu.read_gb_s or (gpu.bandwidth_gb_s or 0) * DATASHEET_SHARE
    bf16 = gpu.bf16_tflop_s or 0
    tensor = {"bf16": bf16, "tf32": bf16 / 2}.get(instruction, gpu.fp8_tflop_s or 2 * bf16)
    if not (bandwidth and tensor and gpu.sms):
        raise ConfigError(
            f"bandwidth, tensor rate or multiprocessors of {gpu.name} are not known",
            hint="name a GPU that `firebox fit --gpu` knows",
        )
    # 1 GB/s is 1e3 bytes a microsecond, 1 TFLOP/s is 1e6 operations
    return _Rates(bandwidth * 1e3, tensor * 1e6 / gpu.sms, bf16 * VECTOR_SHARE * 1e6 / gpu.sms)
