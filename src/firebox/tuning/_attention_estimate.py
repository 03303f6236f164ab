"""What is tuned of attention, and how long it should take: tuning/estimate.py's bounds, for a program that
walks over the keys of its rows, tile after tile.

    decode   requests of one query at the end of a context, whose keys are divided as the engine divides them
    extend   one request, whose last tokens are a chunk

The numbers in RATES were fitted to docs/log/2026-11-21-gpu-kernels.md (H200), its 19 rows of decode with the
tiles that are today's defaults and its two of extend whose tiles are known: within 22 % of each. These are
few, and of other tiles nothing was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from firebox.hardware.base import Gpu
from firebox.kernels import _attention
from firebox.kernels._attention import Config
from firebox.kernels._attention_choice import DECODE, splits
from firebox.kernels.compile import Compiled
from firebox.tuning import estimate
from firebox.tuning.estimate import Tile, norm, read_rate, resident_blocks


@dataclass(frozen=True)
class Problem:
    """One attention layer and its step. `kernel`: DECODE, of as many requests as there are tokens, or EXTEND;
    `context_tokens`: of a request, or the chunk's tokens where those are more; `window_tokens` 0: no
    window."""

    kernel: str
    layer: _attention.Problem
    context_tokens: int
    window_tokens: int = 0

    def requests(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """(queries, context) of each request of a step."""
        if self.kernel == DECODE:
            return ((1, self.context_tokens),) * tokens
        return ((tokens, max(tokens, self.context_tokens)),)

    def splits(self, tokens: int, config: Config, gpu: Gpu) -> int:
        """Among how many blocks decode divides a request's keys, as the engine does it."""
        contexts = (self.context_tokens, self.context_tokens)
        return splits(self.layer, gpu, config, tokens, 1, contexts, self.window_tokens)


@dataclass(frozen=True)
class Rates:
    """What was fitted, on an H200. `read`: the share of the GPU's rate; `mma`: of its matrix products.
    Picoseconds that a multiprocessor takes: `exp` for a score, `touch` for a number of a key or value on its
    way into the products. Microseconds: `begin` of a launch, `program` of a program, `latency` of a load,
    `step` of a tile of keys, `merge` of the launch that adds up. `power`: how the bounds add up."""

    read: float = 0.98
    mma: float = 0.85
    exp: float = 30.0
    touch: float = 39.0
    begin: float = 1.0
    program: float = 4.0
    latency: float = 1.3
    step: float = 0.05
    merge: float = 5.0
    power: float = 3.0


RATES = Rates()


def decode_us(
    p: Problem, tokens: int, config: Config, compiled: Compiled | None, gpu: Gpu, rates: Rates = RATES
) -> float:
    """Of both launches, in microseconds."""
    layer, divided = p.layer, p.splits(tokens, config, gpu)
    keys = min(p.context_tokens, p.window_tokens or p.context_tokens)
    tiles = -(-keys // config.block_n)
    row_blocks = -(-layer.group // config.block_m)
    used = -(-tiles // -(-tiles // divided))  # splits that have any
    programs = tokens * layer.kv_heads * row_blocks * used
    found = _us(p, config, compiled, programs, tiles / used, tokens * keys * _row_bytes(layer), gpu, rates)
    if divided == 1:
        return found
    partial = 2 * 4 * tokens * layer.heads * layer.value_dim * used
    return found + rates.merge + partial / (read_rate(gpu) * estimate.RATES.l2)


def extend_us(
    p: Problem, tokens: int, config: Config, compiled: Compiled | None, gpu: Gpu, rates: Rates = RATES
) -> float:
    """In microseconds."""
    layer, ((queries, context),) = p.layer, p.requests(tokens)
    prefix, group = context - queries, layer.group
    tiles = total = 0
    for first in range(0, queries * group, config.block_m):
        last = min((first + config.block_m - 1) // group, queries - 1)
        begin = max(0, prefix + first // group - p.window_tokens + 1) if p.window_tokens else 0
        tiles, total = tiles + 1, total + -(-(prefix + last + 1 - begin) // config.block_n)
    keys = min(context, p.window_tokens + queries) if p.window_tokens else context
    programs = tiles * layer.kv_heads
    return _us(p, config, compiled, programs, total / tiles, keys * _row_bytes(layer), gpu, rates)


def roof_us(p: Problem, tokens: int, gpu: Gpu) -> float:
    """The least time: every key and value read once, queries and results moved once, or the products, at the
    GPU's best rates."""
    layer, requests = p.layer, p.requests(tokens)
    seen = keys = 0
    for queries, context in requests:
        window = p.window_tokens or context
        keys += min(context, window + queries - 1)
        seen += sum(min(context - queries + i + 1, window) for i in range(queries))
    width = layer.head_dim + layer.value_dim
    moved = keys * _row_bytes(layer) + 2 * tokens * layer.heads * width
    flops = 2 * seen * layer.heads * width
    return max(moved / read_rate(gpu), flops / ((gpu.bf16_tflop_s or estimate.UNKNOWN_TFLOP_S) * 1e6))


def _row_bytes(layer: _attention.Problem) -> int:
    """Of a token's keys and values."""
    width = layer.head_dim + (0 if layer.latent else layer.value_dim)
    return layer.kv_heads * width * layer.kv_dtype.itemsize


def _us(
    p: Problem, config: Config, compiled: Compiled | None, programs: int, steps: float, kv_bytes: float,
    gpu: Gpu, rates: Rates,
) -> float:  # fmt: skip
    """`steps`: tiles of keys of a program, on average; `kv_bytes`: read once at least."""
    layer, read = p.layer, read_rate(gpu) * rates.read
    of_sm, tensor = read / gpu.sms, (gpu.bf16_tflop_s or estimate.UNKNOWN_TFLOP_S) * 1e6 / gpu.sms * rates.mma
    row_bytes = _row_bytes(layer) / layer.kv_heads
    scores = config.block_m * config.block_n
    numbers = config.block_n * (layer.head_dim + layer.value_dim)  # a latent row is key and value
    alu = (scores * rates.exp + numbers * rates.touch) * 1e-6
    mma = 2 * scores * (layer.head_dim + layer.value_dim) / tensor
    loads = config.block_n * row_bytes / (of_sm * estimate.RATES.l2)
    share = min(1.0, config.num_warps / 4)
    chain = max(rates.latency / max(1, (config.num_stages - 1) // 2), rates.step + (alu + mma) / share)
    of_each_sm = programs / gpu.sms
    waves = max(1.0, of_each_sm / resident_blocks(_tile(layer, config, compiled), gpu))
    if waves < estimate.SMOOTH_WAVES:
        waves = math.ceil(waves - 0.02)
    busy = of_each_sm * steps * norm(rates.power, loads, alu, mma)
    alone = waves * (steps * chain + rates.program)
    return rates.begin + norm(rates.power, kv_bytes / read, busy, alone)


def _tile(layer: _attention.Problem, config: Config, compiled: Compiled | None) -> Tile:
    """Uncompiled: shared memory of the tiles in flight, registers of sums and scores."""
    shape = (config.block_m, config.block_n, layer.head_dim, config.num_warps, config.num_stages, False, 1)
    if compiled is not None:
        return Tile(*shape, compiled.shared_bytes, compiled.registers, compiled.spill_bytes)
    width = layer.head_dim + (0 if layer.latent else layer.value_dim)
    flying = max(1, (config.num_stages - 1) // 2)
    shared = flying * config.block_n * width * layer.kv_dtype.itemsize
    threads = estimate.WARP * config.num_warps
    registers = 40 + config.block_m * (layer.value_dim + 1.5 * config.block_n) / threads
    most = config.max_registers or 255
    return Tile(*shape, shared, int(min(most, registers)), 0)
