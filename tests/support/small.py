"""Runs the small kernels over their cases, on a GPU or under Triton's interpreter, and says how far each
output is from its reference. Needs torch and Triton, nothing of the engine.

Outputs are filled with NaN beforehand and have a guard row behind them; caches keep what was in them wherever
no token goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import (
    _kv_write,
    _rows,
    embed,
    latent_write,
    quantise_fp8,
    rms_norm,
    rope_write,
    sigmoid_mul,
    silu_mul,
)
from firebox.kernels.compile import CompileRequest
from firebox.kernels.launch import INTERPRETED, Launcher
from tests.support.experts import DTYPES, relative_error

ROWS = (rms_norm, silu_mul, sigmoid_mul, embed)
WRITERS = (rope_write, latent_write)
KERNELS = {kernel.OP: kernel for kernel in (*ROWS, *WRITERS)}
FP8 = torch.float8_e4m3fn
PAGE_TOKENS = 16
SCALES = (0.21, 0.5)  # of an FP8 cache
# A sum, a root or a quotient that is off in its last bits moves a number over a rounding border now and then,
# by its last place, which is at most so much of it. Off by 2⁻²¹ it moves one number in a thousand of float16
# and an eighth of that of bf16; a norm and a rotation round three times; and there is room for two in small
# outputs. float32 is for scales: the maximum of a group may be a number that was moved.
LAST_PLACE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, FP8: 2**-3}
SHARE, FEW = {torch.float16: 1e-2, torch.bfloat16: 2e-3, FP8: 2e-3}, 2
SCALE_ERROR = 5e-3


class Difference(NamedTuple):
    """`share` of numbers that are not equal, `error` = ‖found − wanted‖ / ‖wanted‖, infinite where one is
    NaN; `explained`: rounding explains both."""

    share: float
    error: float
    explained: bool


def difference(found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, (
        found.dtype,
        found.shape,
        wanted.shape,
    )
    if found.numel() == 0:
        return Difference(0.0, 0.0, True)
    if INTERPRETED and found.dtype == FP8:
        found = _forgiven(found, wanted)
    dtype, found, wanted = found.dtype, found.float(), wanted.float()
    share, error = float((found != wanted).float().mean()), relative_error(found, wanted)
    if dtype not in SHARE:
        return Difference(share, error, error <= SCALE_ERROR)
    most = SHARE[dtype] + FEW / found.numel()
    return Difference(share, error, share <= most and error <= 2 * LAST_PLACE[dtype] * most**0.5)


def faults(found: dict[str, Difference]) -> dict[str, Difference]:
    """The outputs that differ by more than rounding explains."""
    return {name: off for name, off in found.items() if not off.explained}


def _forgiven(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`found` without what Triton's interpreter does to FP8 where a GPU rounds to the nearest, ties to even:
    it rounds ties away from zero, and where rounding carries into the next power of two it may lose the
    carry: the code is 8 too small, or half of a subnormal one; it truncates some of these. That is 2 to 4 in
    a hundred."""
    codes, right = (rows.view(torch.uint8).to(torch.int16) for rows in (found, wanted))
    tie, lost = codes == right + 1, (codes == right - 8) & (right % 8 == 0)
    excused = tie | lost | ((codes < right) & (right - codes <= 4) & (right % 128 <= 8))
    assert float(excused.float().mean()) < 0.05 + 8 / codes.numel(), "more than the interpreter explains"
    return torch.where(excused, right, codes).to(torch.uint8).view(FP8)


def request_of(kernel: ModuleType, problem: Any, gpu: Gpu) -> CompileRequest:
    assert kernel.accepts(problem, gpu) is None, kernel.accepts(problem, gpu)
    return kernel.request(problem, gpu, interpreted=INTERPRETED)


def in_dtype(problem: Any, dtype: str) -> Any:
    """The case in another type; its cache too, unless that is FP8."""
    kv = getattr(problem, "kv_dtype", _kv_write.FP8)
    return dataclasses.replace(problem, dtype=dtype, **({} if kv == _kv_write.FP8 else {"kv_dtype": dtype}))


def run_case(
    op: str, problem: Any, tokens: int, device: str, gpu: Gpu, **changed: Any
) -> dict[str, Difference]:
    """Output → its difference. `changed`: inputs that replace the kernel's own."""
    kernel, generator = KERNELS[op], torch.Generator(device).manual_seed(tokens)
    kind = {"device": device, "dtype": DTYPES[problem.dtype]}
    beside = {"beside": 64} if op == "rms_norm" and tokens % 2 else {}
    given = kernel.inputs(problem, tokens, generator, **beside, **kind) | changed
    launcher = Launcher(request_of(kernel, problem, gpu))
    if op in ("rope_write", "latent_write"):
        return _write(kernel, launcher, problem, tokens, given, generator)
    wanted = kernel.reference(problem, **given)
    outputs = {name: _guarded(rows) for name, rows in wanted.items() if name != "x"}
    passed = {name: value.clone() if name == "delta" else value for name, value in given.items()}
    _settle(device)
    kernel.run(launcher, **passed, **{name: rows[:-1] for name, rows in outputs.items()})
    for name, rows in outputs.items():
        assert (rows[-1].float() == 7.0).all(), f"{name}: the row behind the output was written"
    found = {name: rows[:-1] for name, rows in outputs.items()}
    if "x" in wanted:
        found["x"] = given["x"]
        assert torch.equal(passed["delta"], given["delta"])
    return {name: difference(found[name], rows) for name, rows in wanted.items()}


def _guarded(rows: torch.Tensor) -> torch.Tensor:
    """NaN in the shape of `rows`, with a row of sevens behind."""
    full = torch.full((rows.shape[0] + 1, *rows.shape[1:]), float("nan"), device=rows.device)
    full[-1] = 7.0
    return full.to(rows.dtype)


def _settle(device: str) -> None:
    """The contract of positions and token_slots: written before the launch before began."""
    if device == "cuda":
        torch.cuda.synchronize()


def _write(
    kernel: ModuleType,
    launcher: Launcher,
    problem: Any,
    tokens: int,
    given: dict[str, torch.Tensor],
    generator: torch.Generator,
) -> dict[str, Difference]:
    device, p = given["positions"].device, problem
    pages = 3 + 2 * tokens // PAGE_TOKENS
    slots = torch.randperm(pages * PAGE_TOKENS, generator=generator, device=device)[:tokens] + PAGE_TOKENS
    latent = kernel is latent_write
    row = (1, p.latent_dim + p.rope_dim) if latent else (p.kv_heads, p.head_dim)
    scales = torch.tensor(SCALES, device=device)
    cache_dtype = FP8 if p.kv_dtype == _kv_write.FP8 else DTYPES[p.dtype]
    names = ("cache",) if latent else ("k_cache", "v_cache")
    caches = {
        name: torch.full((pages + 1, PAGE_TOKENS, *row), 7.0, device=device).to(cache_dtype) for name in names
    }
    q, *rows = kernel.reference(p, **given)
    heads = (p.heads, p.latent_dim + p.rope_dim) if latent else (p.heads, p.head_dim)
    found_q = torch.full((tokens + 1, *heads), float("nan"), device=device)
    if latent:
        found_q[..., : p.latent_dim] = 5.0  # somebody else's product
    found_q[-1] = 7.0
    found_q = found_q.to(q.dtype)
    scaled = {"scales": scales} if p.kv_dtype == _kv_write.FP8 else {}
    _settle(device.type)
    kernel.run(launcher, **given, **caches, **scaled, token_slots=slots, q=found_q[:-1])
    assert (found_q[-1] == 7.0).all(), "the row behind q was written"
    used = SCALES if scaled else (1.0, 1.0)
    found = {
        name: difference(_rows_at(caches[name], slots), _kv_write.stored(new, caches[name], scale))
        for name, new, scale in zip(names, rows, used, strict=False)
    }
    untouched = torch.ones((pages + 1) * PAGE_TOKENS, dtype=torch.bool, device=device)
    untouched[slots] = False
    for name, cache in caches.items():
        assert (cache.flatten(0, 1).float()[untouched] == 7.0).all(), (
            f"{name}: a row without a token was written"
        )
    own = found_q[:-1]
    if latent:
        assert (own[..., : p.latent_dim] == 5.0).all(), "columns of q that are not this kernel's were written"
        own = own[..., p.latent_dim :]
    return found | {"q": difference(own, q)}


def _rows_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """`cache` [pages, page_tokens, heads, dim] → [slots, heads, dim]; torch cannot index float8, so as
    bytes."""
    rows = cache.flatten(0, 1)
    return rows.view(torch.uint8)[slots].view(cache.dtype) if cache.itemsize == 1 else rows[slots]


def beyond(op: str, problem: Any, tokens: int, device: str, gpu: Gpu) -> dict[str, Difference]:
    """With inputs so large that codes of an FP8 cache saturate; in numbers that a float16 can hold."""
    kind = {"device": device, "dtype": DTYPES[problem.dtype]}
    given = KERNELS[op].inputs(problem, tokens, torch.Generator(device).manual_seed(1), **kind)
    large = {name: given[name] * 500 for name in ("qkv", "kv_a") if name in given}
    if "weight" in given:
        large["weight"] = given["weight"] * 500  # a latent is normed before it is stored
    assert large
    return run_case(op, problem, tokens, device, gpu, **given | large)


def fused(op: str, problem: Any, tokens: int, device: str, gpu: Gpu) -> bool:
    """Are the codes and scales to the bit those of two launches, the second of kernels/quantise_fp8.py?"""
    kernel, dtype = KERNELS[op], DTYPES[problem.dtype]
    generator = torch.Generator(device).manual_seed(tokens)
    given = kernel.inputs(problem, tokens, generator, device=device, dtype=dtype)
    wanted = {
        name: torch.empty_like(rows)
        for name, rows in kernel.reference(problem, **given).items()
        if name != "x"
    }
    again = {name: value.clone() for name, value in given.items()}
    kernel.run(Launcher(request_of(kernel, problem, gpu)), **given, **wanted)
    plain = dataclasses.replace(problem, outputs=_rows.PLAIN)
    out = torch.empty(wanted["q"].shape, dtype=dtype, device=device)
    kernel.run(Launcher(request_of(kernel, plain, gpu)), **again, out=out)
    rows = quantise_fp8.Problem(out.shape[1], problem.outputs.group, problem.dtype)
    q, scales = torch.empty_like(wanted["q"]), torch.empty_like(wanted["scales"])
    quantise_fp8.run(Launcher(quantise_fp8.request(rows, gpu, interpreted=INTERPRETED)), out, q, scales)
    return torch.equal(q.float(), wanted["q"].float()) and torch.equal(scales, wanted["scales"])


def cases(op: str, dtype: str) -> Iterator[tuple[str, Any]]:
    """An operation's cases by name."""
    for problem in KERNELS[op].CASES:
        yield str(in_dtype(problem, dtype)), in_dtype(problem, dtype)
