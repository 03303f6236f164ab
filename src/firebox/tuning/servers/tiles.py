"""The tiles that SGLang and vLLM can be told to run, and what the compiler makes of them.

    search_space(operands) → (Tile, …)                   what is worth a thought
    estimated(tile, operands, gpu) → Estimate            what a tile should need, to order the compiles
    compile_tiles(wanted, operands, gpu, deadline) → Tried
                                                         as many as there is time for: those that run, and why
                                                         the others do not

Only a compile decides what fits; the estimate decides which compiles come first. BLOCK_SIZE_K divides a block
of scales, because the servers' kernel takes one scale for the whole depth of a tile. A tile that
emulates its instruction is dropped: on Hopper these are fp8 tiles of fewer than 64 rows, which both servers
run with the operands swapped, and our copy of their product does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels.compile import Compiled, CompileRequest, compile_all, limit_bytes
from firebox.planning._foreign_kernel import Operands, Tile, request

BLOCK_M = (16, 32, 64, 128)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (64, 128, 256)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5)
GROUP_M = (1, 16, 32, 64)  # no compile of its own: the order of programs is a run-time argument

WARP_THREADS = 32
SUMS = (4, 128)  # float32 sums that a thread may hold: fewer leave warps idle, more are spilled
MOST_REGISTERS = 255  # of a thread
BATCH_PER_CORE = 4  # compiles between two looks at the clock
MOST_SECONDS = 60.0  # of one compile
_TILE_BYTES = {"bf16": 2, "fp32": 4, "fp8e4nv": 1, "i8": 1, "u8": 1}


class Wanted(NamedTuple):
    """A compile: a tile, of the second product or the first."""

    tile: Tile
    down: bool


@dataclass(frozen=True)
class Estimate:
    """What a tile should need of a multiprocessor: shared bytes of a block, registers of a thread; `spills`:
    more of those than there are."""

    shared_bytes: int
    registers: int
    spills: bool


@dataclass(frozen=True)
class Dropped:
    """A compile that must not be written, in which product, and the reason."""

    tile: Tile
    down: bool
    reason: str
    detail: str


@dataclass(frozen=True)
class Tried:
    """What became of the compiles. `runs`: those that may be written; `left`: not tried for want of time."""

    runs: Mapping[Wanted, Compiled] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()
    left: int = 0


def search_space(operands: Operands) -> tuple[Tile, ...]:
    """In a fixed order, small tiles first."""
    depths = [k for k in BLOCK_K if within_scales(k, operands)]
    return tuple(
        Tile(m, n, k, warps, stages)
        for m in BLOCK_M
        for n in BLOCK_N
        for k in depths
        for warps in NUM_WARPS
        for stages in NUM_STAGES
        if SUMS[0] <= sums(m, n, warps) <= SUMS[1]
    )


def within_scales(block_k: int, operands: Operands) -> bool:
    """Is one scale enough for a tile of this depth? If not, results would be wrong."""
    return operands.scales != "block" or operands.block[1] % block_k == 0


def sums(block_m: int, block_n: int, num_warps: int) -> int:
    """Of a thread."""
    return block_m * block_n // (WARP_THREADS * num_warps)


def buffer_bytes(tile: Tile, operands: Operands) -> int:
    """Shared bytes that the pipeline of loads needs: one buffer of both operands a stage, less one."""
    depth = _TILE_BYTES[operands.x] * tile.block_m + _TILE_BYTES[operands.w] * tile.block_n
    return (tile.num_stages - 1) * tile.block_k * depth


def estimated(tile: Tile, operands: Operands) -> Estimate:
    """Near enough to say which tiles to compile first. Of 51 fp8 tiles on GB10 the shared bytes were exact,
    and 3 of 4 that spilled were known to, with 1 that did not; of 24 int4 tiles the shared bytes were within
    16 KiB, and 3 of 5 that spilled were known to."""
    threads = tile.num_warps * WARP_THREADS
    held = tile.block_k * tile.block_m * _TILE_BYTES[operands.x] / 4
    weights = tile.block_k * tile.block_n
    held += weights * (2 if operands.int4 else _TILE_BYTES[operands.w] / 4)  # int4: unpacked, with its scale
    registers = 50 + sums(tile.block_m, tile.block_n, tile.num_warps) + round(held / threads)
    return Estimate(buffer_bytes(tile, operands), min(MOST_REGISTERS, registers), registers > MOST_REGISTERS)


def too_large(tile: Tile, operands: Operands, gpu: Gpu) -> bool:
    """Not worth a compile: the buffers alone are more than a block may have. Of int4 not all loads are
    pipelined, so that half of them must be."""
    needed = buffer_bytes(tile, operands)
    return (needed // 2 if operands.int4 else needed) > limit_bytes(gpu)


def compile_tiles(wanted: Sequence[Wanted], operands: Operands, gpu: Gpu, deadline: float) -> Tried:
    """Compiles in the order given until `deadline` (of time.monotonic) is near."""
    done = _until(deadline, [request(operands, tile, down, gpu) for tile, down in wanted])
    runs, dropped = dict[Wanted, Compiled](), []
    for one, compiled in zip(wanted, done, strict=False):
        wrong = fault(compiled)
        if wrong is None:
            runs[one] = compiled
        else:
            dropped.append(Dropped(*one, *wrong))
    return Tried(runs, tuple(dropped), len(wanted) - len(done))


def fault(compiled: Compiled) -> tuple[str, str] | None:
    """Why a server should not run this, as a reason and its numbers; None if it may."""
    if compiled.error is not None:
        return "does not compile", compiled.error
    if not compiled.fits:
        return "does not fit", f"{compiled.shared_bytes:,} of {compiled.limit_bytes:,} shared bytes"
    if compiled.spill_bytes:
        return "spills", f"{compiled.spill_bytes:,} bytes of registers"
    if not compiled.native:
        return "is emulated", f"runs as {compiled.instruction}"
    return None


def _until(deadline: float, requests: Sequence[CompileRequest]) -> list[Compiled]:
    """The results of as many of the requests as the time allows, in order."""
    done: list[Compiled] = []
    batch, longest = BATCH_PER_CORE * probe_cpu().cpu_cores, 0.0
    for some in _batches(requests, batch):
        began = time.monotonic()
        if began + longest > deadline:
            break
        done += compile_all(some, limit_s=min(MOST_SECONDS, max(1.0, deadline - began)))
        longest = max(longest, time.monotonic() - began)
    return done


def _batches(requests: Sequence[CompileRequest], size: int) -> Iterator[Sequence[CompileRequest]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
