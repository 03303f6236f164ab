"""The launches of a model's expert layers on one GPU: for every number of tokens which kernels run and at
which configuration, compiled for that GPU and read back.

    problems(parts, dtype, gpu, tp)       the model's expert layers on one of `tp` GPUs, or why none runs them
    planned(problem, gpu, max_tokens)     every compile that 1 … max_tokens tokens can launch
    launches(experts, gpu, max_tokens)    the same, compiled

Imports Triton; compiles nothing before `launches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from firebox.formats import bf16, fp8_block, int4_group
from firebox.formats.base import Format, WeightSlot
from firebox.hardware.base import Gpu
from firebox.kernels._experts import BLOCK, Problem
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from firebox.kernels.moe_gate_up_few import accepts
from firebox.layers.experts import Path, Workspace, like, path_of, requests
from firebox.layers.moe import MoeBlock
from firebox.planning._parts import Part

DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Experts:
    """`layers` expert layers that are alike. `problem` None: no kernel can run them, and `refusal` says
    why."""

    layers: int
    format: str
    problem: Problem | None
    refusal: str | None = None


@dataclass(frozen=True)
class Planned:
    """One compile and the numbers of tokens, `first` … `last`, that launch it."""

    op: str
    first: int
    last: int
    path: Path
    request: CompileRequest

    @property
    def config(self) -> dict[str, Any]:
        """What was chosen for it."""
        chosen = {"moe_gate_up": self.path.gate_up, "moe_down": self.path.down}.get(self.op)
        if chosen is not None:
            return asdict(chosen)
        return {"warps": self.request.num_warps, "stages": self.request.num_stages}


@dataclass(frozen=True)
class Launch:
    """One compile of a model, and what became of it."""

    experts: Experts
    planned: Planned
    compiled: Compiled

    def document(self) -> dict[str, Any]:
        """As `firebox fit --json` prints it."""
        planned, compiled = self.planned, self.compiled
        return {
            "op": planned.op,
            "kernel": compiled.kernel,
            "format": self.experts.format,
            "layers": self.experts.layers,
            "tokens": [planned.first, planned.last],
            "path": planned.path.name,
            "why": planned.path.why,
            "config": planned.config,
            "shared_bytes": compiled.shared_bytes,
            "limit_bytes": compiled.limit_bytes,
            "registers": compiled.registers,
            "spill_bytes": compiled.spill_bytes,
            "instruction": compiled.instruction,
            "native": compiled.native,
            "fits": compiled.fits,
            "error": compiled.error,
        }


def problems(parts: Sequence[Part], dtype: torch.dtype, gpu: Gpu, tp: int) -> tuple[Experts, ...]:
    """The model's expert layers, those that are alike together, on one of `tp` GPUs, which the weights' cuts
    allow."""
    return tuple(_experts(part.block, part, dtype, gpu, tp) for part in parts if part.block is not None)


def planned(problem: Problem, gpu: Gpu, max_tokens: int) -> list[Planned]:
    """Every compile that 1 … `max_tokens` tokens can launch, successive numbers that share one together."""
    made: dict[tuple[int, Path], dict[str, CompileRequest]] = {}
    rows: list[Planned] = []
    open_rows: dict[str, int] = {}  # operation → the index of its latest row
    for tokens in range(1, max_tokens + 1):
        path = path_of(problem, tokens, gpu)
        key = (like(problem, tokens, path), path)
        if key not in made:
            made[key] = requests(problem, key[0], path, gpu)
        for op, request in made[key].items():
            at = open_rows.get(op)
            before = rows[at] if at is not None else None
            if at is not None and before is not None and _continues(before, request, tokens):
                rows[at] = Planned(op, before.first, tokens, before.path, request)
            else:
                open_rows[op] = len(rows)
                rows.append(Planned(op, tokens, tokens, path, request))
    return rows


def launches(experts: Sequence[Experts], gpu: Gpu, max_tokens: int) -> tuple[Launch, ...]:
    """Compiles everything that can be launched for 1 … `max_tokens` tokens."""
    rows = [
        (layers, row)
        for layers in experts
        if layers.problem is not None
        for row in planned(layers.problem, gpu, max_tokens)
    ]
    results = compile_all([row.request for _, row in rows])
    return tuple(Launch(layers, row, result) for (layers, row), result in zip(rows, results, strict=True))


def workspace_bytes(experts: Sequence[Experts], max_tokens: int) -> int:
    """What lies between the launches of a layer, which all layers share: the largest. Layers that no kernel
    runs count nothing."""
    found = (Workspace(e.problem, max_tokens, "meta") for e in experts if e.problem is not None)
    return max(map(_nbytes, found), default=0)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return 0 if value is None else sum(_nbytes(part) for part in vars(value).values())


def _continues(before: Planned, request: CompileRequest, tokens: int) -> bool:
    return before.last == tokens - 1 and before.request == request


def _experts(block: MoeBlock, part: Part, dtype: torch.dtype, gpu: Gpu, tp: int) -> Experts:
    formats = {slot.format for slot, _ in part.slots if isinstance(slot, WeightSlot)} or {bf16.Format()}
    name = " and ".join(sorted(format.name for format in formats))
    refusal = _refusal(formats, dtype)
    if refusal is not None:
        return Experts(part.layers, name, None, refusal)
    p = block.problem
    problem = Problem(
        hidden=p.hidden,
        inter=p.inter // tp,
        experts=p.experts,
        top_k=p.top_k,
        format=name,
        biases=p.biases,
        dtype=DTYPES[dtype],
    )
    if p.activation != problem.activation:  # the numbers count for this one only
        problem = replace(problem, activation=p.activation, limit=p.limit, alpha=p.alpha)
    refusal = accepts(problem, gpu)
    return Experts(part.layers, name, None if refusal else problem, refusal)


def _refusal(formats: set[Format], dtype: torch.dtype) -> str | None:
    """Why no expert kernel takes such weights, or None."""
    if len(formats) > 1:
        return "the matrices of one expert are in different formats"
    if dtype not in DTYPES:
        return f"hidden states are {str(dtype).removeprefix('torch.')}; kernels know bfloat16 and float16"
    return next(_details(next(iter(formats))), None)


def _details(format: Format) -> Iterator[str]:
    """What a kernel takes for granted of a format."""
    if isinstance(format, fp8_block.Format) and format.block != (BLOCK, BLOCK):
        yield f"blocks are {format.block[0]} × {format.block[1]}; kernels know {BLOCK} × {BLOCK}"
    if isinstance(format, int4_group.Format) and (format.group, format.symmetric) != (32, True):
        kind = "symmetric" if format.symmetric else "with zero points"
        yield f"int4 in groups of {format.group}, {kind}; kernels know groups of 32, symmetric"
