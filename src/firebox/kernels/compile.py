"""Compiles Triton kernels for any GPU, on a machine that need not have it, and reads the result back: shared
memory, registers, spills, the tensor instruction, whether that is the one the kernel was written for.

    compile_all([CompileRequest(kernel, signature, constexprs, gpu), …]) → [Compiled, …]

A kernel that does not compile is a result, not a crash: each compiles in a process of its own with a time
limit. Results are kept under FIREBOX_CACHE_DIR, in a file named after everything that decides them: source
of the kernel and of the functions it calls, argument types, constants, options, target, versions of Triton
and of its assembler, and the code of this read-back. Triton is imported by the first call, not with this
file.

Measured: 2 cores, Triton 3.9.0, 2026-11-21: a product of 64 × 128 × 128 in fp8 takes 0.28 s to compile and
0.21 s to disassemble, 60 such take 29 s on the busy machine; the cache reads 500 results in 0.09 s.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firebox.env import read
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import _readback, _running_products
from firebox.kernels._jobs import Outcome, Work, run_all
from firebox.kernels._result_cache import ResultCache

if TYPE_CHECKING:
    from firebox.kernels._triton import Built

# Triton 3.10 changes this default, and a kernel's results and speed with it. Launchers pass it too.
PINNED_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}
_READERS = ("compile.py", "_triton.py", "_readback.py", "_running_products.py")
_CONSTANTS = (int, float, str, type(None))


@dataclass(frozen=True)
class CompileRequest:
    """One kernel at one configuration for one GPU.

    `kernel`: a @triton.jit function. `signature`: run-time argument → Triton type ("*bf16", "*fp8e4nv",
    "i32", "tensordesc<bf16[64, 64]>"). `constexprs`: every other argument → its value (number, string,
    None, Triton type, jit function, or a tuple of them). `aligned`: run-time arguments that are divisible
    by 16, as the JIT finds out at launch; an integer that is 1 is a constexpr to the JIT, so it is one
    here. `options`: further ones of Triton's ("num_ctas", "maxnreg", "arch"). `declares`: the operand kinds
    of the tensor instructions that the kernel is written for ("bf16", "fp8", "mxf4"); none for a kernel
    without a dot."""

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    gpu: Gpu
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    declares: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """What became of a request.

    `shared_bytes` a block; `limit_bytes`: the most a block may ask for, FIREBOX_SMEM_LIMIT included.
    `registers`, `spill_bytes` (stores) and `stack_bytes` are a thread's, as the assembler reported when it
    made this binary. `instruction`: the dominant tensor instruction, such as "mma.fp8" or "none";
    `instructions`: all of them; `machine_code`: they were confirmed in SASS, not read from PTX alone.
    `features`: "tma", "cp.async", "clusters", "pdl", "evict_last" where used. `native`: the instructions are
    of the kinds the kernel declares, no more and no fewer. `error`: why there is no binary, or none that can
    be trusted; the numbers are then 0. `seconds`: how long the compile took, then."""

    kernel: str
    target: int
    limit_bytes: int
    native: bool
    cached: bool
    error: str | None
    seconds: float
    triton: str
    ptxas: str
    shared_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    instruction: str = _readback.NONE
    instructions: tuple[str, ...] = ()
    machine_code: bool = False
    features: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """It compiles, and a block's shared memory is within the limit."""
        return self.error is None and self.shared_bytes <= self.limit_bytes


def compile_all(
    requests: Sequence[CompileRequest],
    workers: int | None = None,
    limit_s: float = 180,
    *,
    keep_binaries: bool = False,
) -> list[Compiled]:
    """The results, in the order of the requests. `workers`: compiles at a time, one a core by default;
    `limit_s`: seconds a compile may take. Requests that are equal compile once. Writes the cache, except for
    compiles that died or took too long: those are tried again the next time. `keep_binaries`: in Triton's own
    cache too, where a Launcher on this machine finds them; a result whose binary was not kept there does not
    count then."""
    cache = ResultCache(read().cache_dir / "triton")
    keys = [
        _kept_key(request_key(request)) if keep_binaries else request_key(request) for request in requests
    ]
    done = {key: (cache.read(key), True) for key in dict.fromkeys(keys)}
    missing = {key: request for key, request in zip(keys, requests, strict=True) if done[key][0] is None}
    works = [functools.partial(_compile_one, request, keep=keep_binaries) for request in missing.values()]
    for outcome in _compile(works, workers or probe_cpu().cpu_cores, limit_s):
        key, document = list(missing)[outcome.index], _document(outcome)
        done[key] = (document, False)
        if not outcome.crashed:
            cache.write(key, document)
    return [_compiled(request, *done[key]) for key, request in zip(keys, requests, strict=True)]


def limit_bytes(gpu: Gpu) -> int:
    """The most shared memory a block may ask for on `gpu`: its own limit, or FIREBOX_SMEM_LIMIT if that is
    less."""
    return min(gpu.smem_per_block_bytes, read().smem_limit_bytes or gpu.smem_per_block_bytes)


def _compile(works: Sequence[Work], workers: int, limit_s: float) -> Iterator[Outcome]:
    if not works:
        return iter(())
    from firebox.kernels import _triton

    _triton.warm()
    return run_all(works, workers, limit_s)


def _compile_one(request: CompileRequest, folder: Path, *, keep: bool) -> dict[str, Any]:
    """Runs in a process of its own."""
    from firebox.kernels import _triton

    made = _triton.source(request.kernel, _types(request), dict(request.constexprs), request.aligned)
    cache = None if keep else folder
    built = _triton.compile_source(made, _target(request), _options(request), cache)
    # What PTX does not ask for is not in the machine code either, and disassembling is half the work.
    tensor = _readback.has_tensor_instructions(built.ptx)
    return _read_back(built, _triton.disassemble(built.cubin, folder) if tensor else "")


def _read_back(built: Built, sass: str | None) -> dict[str, Any]:
    """The fields of Compiled that come from the binary."""
    found = _readback.instructions(built.ptx, sass)
    overwritten = _running_products.overwritten(sass or "")
    if overwritten:
        return {"error": f"the assembler lets a product's operand be overwritten: {overwritten[0]}"}
    return {
        "shared_bytes": built.shared_bytes,
        "instruction": found.dominant,
        "instructions": found.found,
        "machine_code": found.machine_code,
        "features": _readback.features(built.ptx),
        **asdict(_readback.usage(built.log, built.entry)),
    }


def _document(outcome: Outcome) -> dict[str, Any]:
    return {"error": outcome.error, "seconds": round(outcome.seconds, 3), **(outcome.answer or {})}


def _compiled(request: CompileRequest, document: dict[str, Any] | None, cached: bool) -> Compiled:
    from firebox.kernels import _triton

    assert document is not None, f"{request.kernel.__name__} was neither cached nor compiled"
    lists = {name: tuple(value) for name, value in document.items() if isinstance(value, list | tuple)}
    return Compiled(
        kernel=request.kernel.__name__,
        target=_target(request),
        limit_bytes=limit_bytes(request.gpu),
        native=document["error"] is None and is_native(lists["instructions"], request.declares),
        cached=cached,
        triton=_triton.VERSION,
        ptxas=_triton.assembler(_target(request)),
        **(document | lists),
    )


def is_native(instructions: Sequence[str], declares: Sequence[str]) -> bool:
    """Are these instructions of the declared kinds, no more and no fewer? ("wgmma.fp8" is of kind "fp8".)"""
    kinds = {name.partition(".")[2] for name in instructions}
    if "tcgen05.f16" in instructions and "bf16" in declares:  # one instruction for both
        kinds = (kinds - {"f16"}) | {"bf16"}
    return kinds == set(declares)


def _target(request: CompileRequest) -> int:
    target = request.gpu.triton_target
    assert target is not None, f"{request.gpu.name} runs no Triton kernels"
    return target


def _options(request: CompileRequest) -> dict[str, Any]:
    chosen = {"num_warps": request.num_warps, "num_stages": request.num_stages}
    return {**PINNED_OPTIONS, **request.options, **chosen}


def _types(request: CompileRequest) -> dict[str, str]:
    """Argument → type, in the kernel's order."""
    given = {**request.signature, **dict.fromkeys(request.constexprs, "constexpr")}
    names = request.kernel.arg_names
    assert set(given) == set(names), f"{request.kernel.__name__} takes {names}, not {list(given)}"
    assert set(request.aligned) <= set(request.signature), f"not run-time arguments: {request.aligned}"
    return {name: given[name] for name in names}


def request_key(request: CompileRequest) -> str:
    """A hash of everything that decides what a request is compiled to. The kernel's `cache_key` covers the
    functions it calls."""
    from firebox.kernels import _triton

    constants = [(name, _constant_key(value)) for name, value in sorted(request.constexprs.items())]
    parts = (
        _readers(),
        request.kernel.cache_key,
        sorted(_types(request).items()),
        constants,
        sorted(request.aligned),
        _triton.fingerprint(_target(request), _options(request)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _kept_key(key: str) -> str:
    """Of a result whose binary lies in the folder that is Triton's cache now."""
    from firebox.kernels import _triton

    return hashlib.sha256(f"{key} {_triton.cache_folder()}".encode()).hexdigest()


def _constant_key(value: Any) -> str:
    """Text that tells constants apart, and does not change between processes."""
    if isinstance(value, tuple):
        return f"({', '.join(_constant_key(item) for item in value)})"
    if hasattr(value, "cache_key"):  # a jit function, such as a format's decode
        return str(value.cache_key)
    known = isinstance(value, _CONSTANTS) or type(value).__module__.startswith("triton.language")
    assert known, f"a kernel's constant cannot be {value!r}"
    return f"{type(value).__name__}:{value!r}"


@functools.cache
def _readers() -> str:
    """A hash of the code that reads results back: what an older one wrote does not count."""
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in _READERS)
    return hashlib.sha256(sources).hexdigest()
