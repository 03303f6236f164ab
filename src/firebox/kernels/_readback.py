"""Reads what the compiler made of a kernel, from text alone: tensor instructions from PTX and machine code
(SASS), registers and spills from the assembler's log.

    PTX   mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32   what Triton asked for
    SASS  QMMA.16832.F32.E4M3.E4M3                              what the assembler made of it

The assembler may itself emulate (int4 mma becomes int8 mma and shifts), so an instruction counts when both
agree, and where they do not, the machine code is right.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

NONE = "none"

_FP8 = r"(e4m3|e5m2)\.(e4m3|e5m2)"
_FP8_SASS = r"E[45]M[23]\.E[45]M[23]"
_SCALED = r"block_scale\S*"
# name → PTX pattern, SASS pattern. The SASS of tcgen05 names the width of the operands, not their type.
_INSTRUCTIONS = {
    "mma.bf16": (r"mma\.sync\S*\.bf16\.bf16", r"HMMA\.\d+\.F32\.BF16"),
    "mma.f16": (r"mma\.sync\S*\.f16\.f16\.f(16|32)$", r"HMMA\.\d+\.F(16|32)$"),
    "mma.tf32": (r"mma\.sync\S*\.tf32\.tf32", r"HMMA\.\d+\.F32\.TF32"),
    "mma.int8": (r"mma\.sync\S*\.[su]8\.[su]8", r"IMMA\.\d+\.[SU]8"),
    "mma.fp8": (rf"mma\.sync(?!\S*block_scale)\S*\.{_FP8}", rf"QMMA\.\d+\.F\d+\.{_FP8_SASS}$"),
    "mma.mxf8": (
        rf"mma\.sync\S*kind::mxf8f6f4\.{_SCALED}\.{_FP8}",
        rf"QMMA\.SF\.\d+\.F32\.{_FP8_SASS}",
    ),
    "mma.mxf4": (rf"mma\.sync\S*kind::mxf4\S*{_SCALED}\.ue8m0", r"OMMA\.SF\.\d+\.F32\.E2M1\.E2M1\.E8"),
    "mma.nvf4": (rf"mma\.sync\S*kind::mxf4nvf4\.{_SCALED}\.ue4m3", r"OMMA\.SF\.\d+\.F32\.E2M1\.E2M1\.UE4M3"),
    "wgmma.bf16": (r"wgmma\.mma_async\S*\.bf16\.bf16", r"HGMMA\S*\.BF16"),
    "wgmma.f16": (r"wgmma\.mma_async\S*\.f16\.f16", r"HGMMA\.[\dx]+\.F(16|32)$"),
    "wgmma.tf32": (r"wgmma\.mma_async\S*\.tf32\.tf32", r"HGMMA\S*\.TF32"),
    "wgmma.int8": (r"wgmma\.mma_async\S*\.[su]8\.[su]8", r"IGMMA"),
    "wgmma.fp8": (rf"wgmma\.mma_async\S*\.{_FP8}", r"QGMMA"),
    "tcgen05.f16": (r"tcgen05\.mma\S*kind::f16", r"UTCHMMA"),
    "tcgen05.tf32": (r"tcgen05\.mma\S*kind::tf32", r"UTCHMMA"),
    "tcgen05.int8": (r"tcgen05\.mma\S*kind::i8", r"UTCIMMA"),
    "tcgen05.fp8": (r"tcgen05\.mma\S*kind::f8f6f4", r"UTCQMMA"),
    "tcgen05.mxf8": (r"tcgen05\.mma\S*kind::mxf8f6f4", r"UTCQMMA"),
    "tcgen05.mxf4": (r"tcgen05\.mma\S*kind::mxf4(nvf4)?\.\S*block32", r"UTCOMMA"),
    "tcgen05.nvf4": (r"tcgen05\.mma\S*kind::mxf4nvf4\S*block16", r"UTCOMMA"),
}
_FEATURES = {
    "tma": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]\.",
    "clusters": r"barrier\.cluster|\.reqnctapercluster",
    "pdl": r"griddepcontrol",
    "evict_last": r"L2::evict_last",
}
_PTX_LINE = re.compile(
    r"^\s*(?:@!?%\w+\s+)?((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*)", re.MULTILINE
)
_SASS_NAME = re.compile(r"\b((?:UTC)?[HIQODB]G?MMA(?:\.\w+)*)")
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")


@dataclass(frozen=True)
class Instructions:
    """Tensor instructions of a kernel. `dominant`: the one with the most multiply-adds by static count,
    "none" without any; `found`: all, dominant first; `machine_code`: whether SASS was read, or PTX
    alone."""

    dominant: str
    found: tuple[str, ...]
    machine_code: bool


@dataclass(frozen=True)
class Usage:
    """What the assembler reports of one entry function: registers a thread, bytes of spill stores and of
    stack frame a thread."""

    registers: int
    spill_bytes: int
    stack_bytes: int


def instructions(ptx: str, sass: str | None) -> Instructions:
    """The tensor instructions of a kernel; `sass` None where no disassembler knows the target."""
    work = _ptx_work(ptx)
    if sass is not None:
        work = _as_assembled(work, sass)
    found = tuple(name for name, _ in work.most_common())
    return Instructions(found[0] if found else NONE, found, sass is not None)


def has_tensor_instructions(ptx: str) -> bool:
    """Does PTX ask for any?"""
    return _PTX_LINE.search(ptx) is not None


def features(ptx: str) -> tuple[str, ...]:
    """What else of the hardware a kernel uses: "tma", "cp.async", "clusters", "pdl", "evict_last"."""
    return tuple(name for name, pattern in _FEATURES.items() if re.search(pattern, ptx))


def usage(log: str, entry: str) -> Usage:
    """What `ptxas -v` printed of the function `entry`. The log must have it."""
    at = log.find(f"Function properties for {entry}\n")
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log[at:])
    registers = re.search(r"Used (\d+) registers", log[at:])
    assert at >= 0 and frame and registers, f"ptxas says nothing of {entry}: {log!r}"
    return Usage(int(registers[1]), spill_bytes=int(frame[2]), stack_bytes=int(frame[1]))


def _ptx_work(ptx: str) -> Counter[str]:
    """Instruction → multiply-adds it stands for in the text, loops unrolled or not. tcgen05 names no shape;
    each counts as one."""
    work: Counter[str] = Counter()
    for text in _PTX_LINE.findall(ptx):
        name = next((name for name, (ptx_of, _) in _INSTRUCTIONS.items() if re.match(ptx_of, text)), text)
        shape = _SHAPE.search(text)
        work[name] += int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 1
    return work


def _as_assembled(work: Counter[str], sass: str) -> Counter[str]:
    """`work` of the instructions that are in the machine code; one that is only there counts as little."""
    found: Counter[str] = Counter()
    for text in set(_SASS_NAME.findall(sass)):
        fitting = [name for name, (_, sass_of) in _INSTRUCTIONS.items() if re.match(sass_of, text)] or [text]
        for name in [name for name in fitting if name in work] or fitting[:1]:
            found[name] = work.get(name, 1)
    return found
