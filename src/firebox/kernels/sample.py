"""From logits to tokens, one request a row, with the row's own parameters on the device:

    s = (logits + bias) / max(temperature, 10⁻⁵)
    kept = the top_k largest s, with all that equal the last one; of these the likeliest up to the first whose
        sum reaches top_p, with all that equal it; of these those with p ≥ min_p · max p
    token = argmin over kept of ln E_i + (max s − s_i),  E_i as in kernels/cpu_race.py

temperature 0: token = argmax(logits + bias), the lowest id among equals. logits [rows, vocab] float32, left
unchanged; bias the same or none: whatever penalties and biases come to, already added up (repetition
penalties, which multiply, must be in the logits). temperature, top_p, min_p [rows] float32, top_k [rows]
int32 (0 or vocab and more: all), seed and position [rows] int64; token_ids [rows] int64. So one captured
graph serves any mix of requests.

Random numbers are Philox4x32-10 at (position, token // 4) under the key `seed`: the CPU's. The race is run in
float32 and on logarithms, so winners are the CPU's but where two tokens finish within 10⁻⁶ of each other. The
kept set is the CPU's, except: top_p keeps all that equal the last one, where engine/sampler.py keeps those of
lowest id; and a sum that meets top_p within float32 rounding may do so one token earlier or later.

A program takes CHUNK tokens: it finds their maximum and the winner of their race. The last one of a row (a
counter says so; it is zero before and after) lets the winners race. Where a row filters, a program also sorts
its chunk and writes, largest first, the values, the sum of probabilities so far and the winner so far. What a
threshold keeps of a chunk is then its first n, whose sum and winner are known; the last program finds the
threshold by halving the range of values and looking it up in all chunks at once. All sums are in an order of
their own: the result does not depend on the batch or on which program ends last.

Source: own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from firebox.hardware.base import Gpu
from firebox.kernels._pdl import let_next_launch_begin, wait_for_launch_before
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import Launcher
from firebox.kernels.moe_route import sortable, unsortable
from firebox.kernels.plan import Compile

# ---- 1. the problem

OP = "sample"
LEAST_TEMPERATURE = tl.constexpr(1e-5)  # engine/sampler.py's
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
LOW_WORD = tl.constexpr(0xFFFFFFFF)


@dataclass(frozen=True)
class Problem:
    """`bias`: there is one. `filters`: rows may have top_k, top_p or min_p; without, these are not read and
    no scratch memory is needed for them."""

    vocab: int
    bias: bool = False
    filters: bool = True


@dataclass(frozen=True)
class Config:
    """`chunk`: tokens that a program takes, a power of two."""

    chunk: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class Parameters:
    """One number a row; shapes and types as above. Only `temperature`, `seed` and `position` are read where
    the problem has no filters."""

    temperature: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


@dataclass(frozen=True)
class Scratch:
    """`tops` float32 and `winners` int32 [rows, chunks]; `ended` [rows] int32, zero between calls. With
    filters, `values` and `masses` float32 and `firsts` int16 [rows, chunks · chunk], else None: 10 bytes a
    token. Calls for slices of the rows can share one scratch of a slice."""

    tops: torch.Tensor
    winners: torch.Tensor
    ended: torch.Tensor
    values: torch.Tensor | None
    masses: torch.Tensor | None
    firsts: torch.Tensor | None


def accepts(problem: Problem, gpu: Gpu) -> str | None:
    """NVIDIA GPUs."""
    if gpu.kind != "cuda":
        return "is made for NVIDIA GPUs"
    return None if problem.vocab <= 2**20 else f"samples from up to 1,048,576 tokens, not {problem.vocab}"


def search_space(problem: Problem, gpu: Gpu) -> Iterator[Config]:
    """Chunks that are worth compiling."""
    for chunk in (512, 1024, 2048, 4096):
        yield from (Config(chunk, warps) for warps in (4, 8) if chunk // warps <= 512)


def default(problem: Problem, gpu: Gpu) -> Config:
    """For want of a tuned one: sorting is dearer the longer a chunk is, all else cheaper. An H200, 201,088
    tokens, 1 and 256 rows: 63 and 1,621 us with filters in chunks of 512, 58 and 2,191 of 1,024; greedy 2.9
    and 66 us in chunks of 2,048, 3.0 and 87 of 1,024."""
    return Config(512, 4) if problem.filters else Config(2048, 4)


def chunks(problem: Problem, config: Config) -> int:
    """Programs a row."""
    return -(-problem.vocab // config.chunk)


def scratch(problem: Problem, config: Config, rows: int, device: torch.device | str) -> Scratch:
    """For up to so many rows a call."""
    count = chunks(problem, config)

    def empty(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(rows, width, dtype=dtype, device=device)

    wide, filters = count * config.chunk, problem.filters
    return Scratch(
        tops=empty(count),
        winners=empty(count, torch.int32),
        ended=torch.zeros(rows, dtype=torch.int32, device=device),
        values=empty(wide) if filters else None,
        masses=empty(wide) if filters else None,
        firsts=empty(wide, torch.int16) if filters else None,
    )


# ---- 2. the device code


@triton.jit
def _log_of_exponential(word):
    """ln E of a random word. With n = word // 256, E = −ln(1 − (2n + 1) / 2²⁵): of v or of 1 − v, whichever
    is below ½, float32 holds every bit; and ln(1 − v) is put right where 1 − v is rounded."""
    n = (word >> 8).to(tl.int32)
    small = n < 8388608
    odd = tl.where(small, 2 * n + 1, 33554431 - 2 * n)
    part = odd.to(tl.float32) * 2.9802322387695312e-08  # v, or 1 − v
    rest = tl.where(small, 1.0 - part, part)
    lost = 1.0 - rest
    e = -tl.log(rest)
    near = tl.where(lost == 0.0, part, e * (part / tl.where(lost == 0.0, 1.0, lost)))
    return tl.log(tl.where(small, near, e))


@triton.jit
def _words(block, seed, position):
    """Philox at counter (position, block)."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = block * 0
    return tl.philox(seed, low + zero.to(tl.uint32), high + zero.to(tl.uint32), block, zero)


@triton.jit
def _log_times(token, seed, position):
    """ln E of any tokens [n]."""
    w0, w1, w2, w3 = _words(token // 4, seed, position)
    at = token % 4
    return _log_of_exponential(tl.where(at < 2, tl.where(at == 0, w0, w1), tl.where(at == 2, w2, w3)))


@triton.jit
def _log_times_of_chunk(first, seed, position, CHUNK: tl.constexpr):
    """The same of `first` … first + CHUNK, `first` a multiple of 4: four tokens share a block of words."""
    w0, w1, w2, w3 = _words(first // 4 + tl.arange(0, CHUNK // 4), seed, position)
    return _log_of_exponential(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (CHUNK,)))


@triton.jit
def _scaled(logits, bias, at, there, temperature):
    s = tl.load(logits + at, mask=there, other=float("-inf"))
    if bias is not None:
        s += tl.load(bias + at, mask=there, other=0.0)
    if temperature > 0.0:
        s = tl.div_rn(s, tl.maximum(temperature, LEAST_TEMPERATURE) + tl.zeros_like(s))
    return s


@triton.jit
def _with_number(x, number):
    """An integer that sorts by `x`, and among equals by `number` ≥ 0."""
    return (sortable(x).to(tl.int64) << 32) | number.to(tl.int64)


@triton.jit
def _finish(log_time, s, top):
    """When a token finishes; what is excluded never does."""
    return tl.where(s == float("-inf"), float("inf"), log_time + (top - s))


@triton.jit
def _lesser(a, b):
    return tl.minimum(a, b)


@triton.jit
def _race_chunk(s, top, first, seed, position, temperature, winner, CHUNK: tl.constexpr):
    """Writes the number of one chunk's winner. Greedy: all run equally fast."""
    wins = s == top
    if temperature > 0.0:
        time = _finish(_log_times_of_chunk(first, seed, position, CHUNK), s, top)
        wins = time == tl.min(time, 0)
    tl.store(winner, first + tl.min(tl.where(wins, tl.arange(0, CHUNK), CHUNK - 1), 0))


@triton.jit
def _sort_chunk(s, top, first, seed, position, values, masses, firsts, CHUNK: tl.constexpr):
    """Writes one chunk's three columns."""
    i = tl.arange(0, CHUNK)
    key = tl.sort(_with_number(s, i), descending=True)
    member = (key & LOW_WORD).to(tl.int32)
    value = unsortable((key >> 32).to(tl.int32))
    mass = tl.where(value == float("-inf"), 0.0, tl.exp(value - top))
    time = _finish(_log_times(first + member, seed, position), value, top)
    winner = tl.associative_scan(_with_number(time, member), 0, _lesser)
    at = first.to(tl.int64) + i
    tl.store(values + at, value)
    tl.store(masses + at, tl.cumsum(mass, 0))
    tl.store(firsts + at, (winner & LOW_WORD).to(tl.int16))


@triton.jit
def _count_from(values, at, narrow, wide, pivot):
    """How many of each chunk are at least `pivot`, which is between `narrow` and `wide`."""
    left = narrow
    right = wide
    while tl.max(right - left) > 0:
        middle = (left + right) // 2
        open = left < right
        value = tl.load(values + at + middle, mask=open, other=0.0, cache_modifier=".cg")
        left = tl.where(open & (value >= pivot), middle + 1, left)
        right = tl.where(open & (value < pivot), middle, right)
    return left


@triton.jit
def _mass_of(masses, at, count, weight):
    """Σ of the first `count` of each chunk."""
    mass = tl.load(masses + at + count - 1, mask=count > 0, other=0.0, cache_modifier=".cg")
    return tl.sum(mass * weight)


@triton.jit
def _range_left(values, at, narrow, wide):
    """The least and the largest value of those after the first `narrow` up to `wide`."""
    some = narrow < wide
    least = tl.load(values + at + wide - 1, mask=some, other=float("inf"), cache_modifier=".cg")
    largest = tl.load(values + at + narrow, mask=some, other=float("-inf"), cache_modifier=".cg")
    return tl.min(least), tl.max(largest)


@triton.jit
def _keep(values, masses, at, wide, weight, target, BY_MASS: tl.constexpr):
    """How many of each chunk, at most the first `wide`, are needed to reach `target`: in number, or in mass.
    Equal values are kept together."""
    narrow = tl.zeros_like(wide)
    least, largest = _range_left(values, at, narrow, wide)
    while least < largest:
        pivot = tl.where(least == float("-inf"), LOWEST, least * 0.5 + largest * 0.5)
        pivot = tl.where(pivot <= least, largest, pivot)  # neighbours among floats
        count = _count_from(values, at, narrow, wide, pivot)
        if BY_MASS:
            enough = _mass_of(masses, at, count, weight) >= target
        else:
            enough = tl.sum(count) >= target
        wide = tl.where(enough, count, wide)
        narrow = tl.where(enough, narrow, count)
        least, largest = _range_left(values, at, narrow, wide)
    return wide


@triton.jit
def _kept_of_chunks(
    values, masses, chunk, its_top, few, top_k, top_p, min_p, VOCAB: tl.constexpr, CHUNK: tl.constexpr
):
    """How many of each chunk pass the filters: its first ones."""
    top = tl.max(its_top, 0)
    at = chunk.to(tl.int64) * CHUNK
    weight = tl.where(its_top == float("-inf"), 0.0, tl.exp(its_top - top))
    kept = tl.maximum(tl.minimum(VOCAB - chunk * CHUNK, CHUNK), 0)
    if few:
        kept = _keep(values, masses, at, kept, weight, top_k, False)
    if top_p < 1.0:
        target = top_p * _mass_of(masses, at, kept, weight)
        kept = _keep(values, masses, at, kept, weight, target, True)
    if min_p > 0.0:
        least = tl.minimum(top + tl.log(min_p), top)
        kept = _count_from(values, at, tl.zeros_like(kept), kept, least)
    return kept


@triton.jit
def _race_of_winners(
    logits, bias, token, real, its_top, seed, position, temperature, token_id, VOCAB: tl.constexpr
):
    """The race between `token` [chunks], those that are `real`; the winner is written."""
    s = _scaled(logits, bias, token, real & (token < VOCAB), temperature)
    log_time = tl.zeros_like(s)
    if temperature > 0.0:
        log_time = _log_times(token, seed, position)
    time = _finish(log_time, s, tl.max(its_top, 0))
    best = tl.min(tl.where(real, _with_number(time, token), 9223372036854775807), 0) & LOW_WORD
    tl.store(token_id, tl.minimum(best, VOCAB - 1))


@triton.jit
def _plain_race(
    logits, bias, winners, chunk, its_top, seed, position, temperature, token_id, VOCAB: tl.constexpr,
    CHUNKS: tl.constexpr
):  # fmt: skip
    token = tl.load(winners + chunk, mask=chunk < CHUNKS, other=0, cache_modifier=".cg")
    _race_of_winners(
        logits, bias, token, chunk < CHUNKS, its_top, seed, position, temperature, token_id, VOCAB
    )


@triton.jit
def sample_rows(
    logits, bias, temperature, seed, position, top_k, top_p, min_p, tops, winners, ended, values, masses,
    firsts, token_ids,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr,
    FILTERS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before(PDL)
    let_next_launch_begin(PDL)
    mine = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    logits += row * VOCAB
    if bias is not None:
        bias += row * VOCAB
    t = tl.load(temperature + row)
    its_seed = tl.load(seed + row)
    its_position = tl.load(position + row)
    if FILTERS:
        values += row * (CHUNKS * CHUNK)
        masses += row * (CHUNKS * CHUNK)
        firsts += row * (CHUNKS * CHUNK)
        k = tl.load(top_k + row)
        p = tl.load(top_p + row)
        least_p = tl.load(min_p + row)
        few = (k > 0) & (k < VOCAB)
        filtered = (t > 0.0) & (few | (p < 1.0) | (least_p > 0.0))
    first = mine * CHUNK
    i = tl.arange(0, CHUNK)
    s = _scaled(logits, bias, first + i, first + i < VOCAB, t)
    top = tl.max(s, 0)
    if FILTERS:
        if filtered:
            _sort_chunk(s, top, first, its_seed, its_position, values, masses, firsts, CHUNK)
        else:
            _race_chunk(s, top, first, its_seed, its_position, t, winners + row * CHUNKS + mine, CHUNK)
    else:
        _race_chunk(s, top, first, its_seed, its_position, t, winners + row * CHUNKS + mine, CHUNK)
    tl.store(tops + row * CHUNKS + mine, top)
    tl.debug_barrier()  # every thread's part is written before the counter says so
    if tl.atomic_add(ended + row, 1, sem="acq_rel") == CHUNKS - 1:
        tl.debug_barrier()
        chunk = tl.arange(0, CHUNKS_PADDED)
        its_top = tl.load(
            tops + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"), cache_modifier=".cg"
        )
        if FILTERS:
            if filtered:
                kept = _kept_of_chunks(values, masses, chunk, its_top, few, k, p, least_p, VOCAB, CHUNK)
                last = chunk.to(tl.int64) * CHUNK + kept - 1
                member = tl.load(firsts + last, mask=kept > 0, other=0, cache_modifier=".cg")
                token = chunk * CHUNK + member.to(tl.int32)
                _race_of_winners(
                    logits, bias, token, kept > 0, its_top, its_seed, its_position, t, token_ids + row, VOCAB
                )
            else:
                _plain_race(
                    logits, bias, winners + row * CHUNKS, chunk, its_top, its_seed, its_position, t,
                    token_ids + row, VOCAB, CHUNKS,
                )  # fmt: skip
        else:
            _plain_race(
                logits, bias, winners + row * CHUNKS, chunk, its_top, its_seed, its_position, t,
                token_ids + row, VOCAB, CHUNKS,
            )  # fmt: skip
        tl.store(ended + row, 0)


# ---- 3. the launch


def request(problem: Problem, config: Config, gpu: Gpu, *, interpreted: bool = False) -> CompileRequest:
    """One compile for any number of rows."""
    pdl = "pdl" in gpu.facts and not interpreted
    filters = ("top_k", "top_p", "min_p", "values", "masses", "firsts")
    types = dict.fromkeys(("logits", "bias", "temperature", "tops", *filters), "*fp32")
    types |= {"firsts": "*i16", "top_k": "*i32", "winners": "*i32", "ended": "*i32"}
    types |= dict.fromkeys(("seed", "position", "token_ids"), "*i64")
    absent: tuple[str, ...] = () if problem.bias else ("bias",)
    absent += () if problem.filters else filters
    count = chunks(problem, config)
    signature = {name: type for name, type in types.items() if name not in absent}
    constants = {
        "VOCAB": problem.vocab,
        "CHUNK": config.chunk,
        "CHUNKS": count,
        "CHUNKS_PADDED": triton.next_power_of_2(count),
        "FILTERS": problem.filters,
        "PDL": pdl,
    }
    return CompileRequest(
        sample_rows,
        signature,
        dict.fromkeys(absent) | constants,
        gpu,
        tuple(signature),
        num_warps=config.warps,
        options={"launch_pdl": True} if pdl else {},
    )


def kinds(vocab: int) -> tuple[Problem, Problem]:
    """What the engine draws with: rows that have a temperature only, and rows that filter."""
    return Problem(vocab, filters=False), Problem(vocab, filters=True)


def variants(vocab: int, gpu: Gpu) -> tuple[Compile, ...]:
    """Those of `kinds`, for the plan."""
    found = []
    for problem, variant in zip(kinds(vocab), ("", "filters"), strict=True):
        config = default(problem, gpu)
        found.append(Compile(OP, request(problem, config, gpu), config, variant))
    return tuple(found)


def run(
    launcher: Launcher,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    parameters: Parameters,
    scratch: Scratch,
    token_ids: torch.Tensor,
) -> None:
    """Writes `token_ids` for all rows of `logits`; changes `scratch`."""
    rows, names = logits.shape[0], launcher.request.signature
    given = {"logits": logits, "bias": bias, "token_ids": token_ids, **vars(parameters), **vars(scratch)}
    if rows:
        grid = (launcher.request.constexprs["CHUNKS"], rows, 1)
        launcher(grid, **{name: tensor for name, tensor in given.items() if name in names})


# ---- 4. the reference


def kept(problem: Problem, logits: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """Which tokens may be drawn, [rows, vocab] bool; sums in float64."""
    keep = torch.ones_like(logits, dtype=torch.bool)
    scaled = logits / parameters.temperature.clamp(min=LEAST_TEMPERATURE.value).unsqueeze(-1)
    for row, k, p, least_p, mask in zip(
        scaled, parameters.top_k.tolist(), parameters.top_p, parameters.min_p, keep, strict=True
    ):
        if 0 < k < problem.vocab:
            mask &= row >= row.topk(k).values[-1]
        if p < 1.0:
            values, _ = row.masked_fill(~mask, -torch.inf).double().sort(descending=True)
            probabilities = values.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            last = values[before < p.double()][-1] if p > 0 else values[0]
            mask &= row.double() >= last
        if least_p > 0.0:
            mask &= row.double() >= row.double().max() + least_p.double().log()
    return keep


def reference(
    problem: Problem, logits: torch.Tensor, bias: torch.Tensor | None, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids [rows], and by how much each one's logarithm of the time beats the next (infinite where
    nothing could tie): where that is below 10⁻⁵ another winner is as right. On the CPU."""
    adjusted = logits if bias is None else logits + bias
    winners, leads = adjusted.argmax(-1), torch.full((len(logits),), torch.inf)
    keep = kept(problem, adjusted, parameters) if problem.filters else torch.ones_like(adjusted).bool()
    for row, (seed, position) in enumerate(
        zip(parameters.seed.tolist(), parameters.position.tolist(), strict=True)
    ):
        temperature = parameters.temperature[row]
        if temperature <= 0.0:
            winners[row] = int((adjusted[row] == adjusted[row].max()).nonzero()[0])
            continue
        s = (adjusted[row] / temperature.clamp(min=LEAST_TEMPERATURE.value)).double()
        finish = random_times(problem.vocab, seed, position).log() - s
        finish = finish.masked_fill(~keep[row] | (s == -torch.inf), torch.inf)
        best = finish.sort(stable=True)
        winners[row] = best.indices[0]
        leads[row] = float(best.values[1] - best.values[0]) if problem.vocab > 1 else torch.inf
    return winners, leads


def random_times(vocab: int, seed: int, position: int) -> torch.Tensor:
    """E of every token, float64 [vocab]: Philox4x32-10 over whole columns of counters."""
    mask = 2**32 - 1
    block = torch.arange(-(-vocab // 4), dtype=torch.int64)
    c0, c1 = torch.full_like(block, position & mask), torch.full_like(block, position >> 32 & mask)
    c2, c3 = block & mask, block >> 32
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    words = torch.stack((c0, c1, c2, c3), -1).flatten()[:vocab]
    return -torch.log1p(-((words // 256).double() + 0.5) / 2**24)


def _product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of factor · x, in int64 that must not overflow."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    low += (high & 0xFFFF) << 16
    return (high >> 16) + (low >> 32), low & 0xFFFFFFFF
