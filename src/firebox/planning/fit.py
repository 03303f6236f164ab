"""`firebox fit MODEL`: would this model run on GPUs that need not be here, and how fast could it be?

    open_source(source, gpu) → Opened       the model without memory
    plan(opened, gpu, tp, engine) → Fit     memory and roof
    compiled(fit) → Fit                     and every launch of its layers, compiled for the GPU

The check is partial, and the answer says so: operations that are composed of torch operators on a GPU are
listed by name; what they will ask for is not part of `fits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from firebox.config import EngineConfig
from firebox.errors import ConfigError, FireboxError, UnsupportedFormat
from firebox.hardware.base import Gpu
from firebox.kernels import cpu_attention_block, cpu_dense_block, cpu_head, cpu_moe_block
from firebox.kernels.plan import Library, Setting
from firebox.layers.decoder import Decoder
from firebox.layers.linear import DENSE
from firebox.models.base import need
from firebox.planning import launches
from firebox.planning._parts import Opened, Source, all_slots, kv_dtype, open_source
from firebox.planning.launches import Launch, Layers
from firebox.planning.memory import GIB, Memory, Sizes, cache_bytes, ledger
from firebox.planning.roof import Roof, roof
from firebox.weights.cuts import SIZES, check_cuts, refusal

__all__ = ["Fit", "Opened", "Source", "compiled", "open_source", "plan"]

CONTEXT_TOKENS = 4096  # unless --context-length says otherwise
MAX_TOKENS = 8192  # launches are planned for at least so many tokens a step
PLANNED = (cpu_attention_block.OP, cpu_moe_block.OP, cpu_dense_block.OP, cpu_head.OP)
EMBEDDING = "embedding"
TORCH_ONLY = "composed of torch operators on a GPU"


@dataclass(frozen=True)
class Fit:
    """The answer. `refusal`: why the model cannot be cut this way; memory and roof are then None. `launches`
    None: not compiled. `not_planned`: operations that are composed of torch operators. `help`: what would
    make it fit."""

    source: Source
    gpu: Gpu
    tp: int
    working_tp: tuple[int, ...]
    max_tokens: int
    not_planned: tuple[str, ...]
    refusal: str | None = None
    memory: Memory | None = None
    roof: Roof | None = None
    layers: tuple[Layers, ...] = ()
    launches: tuple[Launch, ...] | None = None
    help: tuple[str, ...] = field(default=())

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not fit, one sentence each; empty if it does, as far as was checked."""
        return tuple(_problems(self))

    @property
    def fits(self) -> bool:
        """Nothing that was checked speaks against it."""
        return not self.problems

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What --strict refuses, one sentence each: layers that fall back to torch operators, and launches
        written for a tensor instruction that the compiler did not use."""
        return tuple(_fallbacks(self))

    @property
    def checked(self) -> tuple[str, ...]:
        """What `fits` is about."""
        if self.memory is None:
            return ("tp",)
        return ("memory",) if self.launches is None else ("memory", "launches")

    def document(self) -> dict[str, Any]:
        """As `firebox fit MODEL --json` prints it."""
        return {
            "fits": self.fits,
            "model": self.source.name,
            "gpu": self.gpu.name,
            "tp": self.tp,
            "checked": list(self.checked),
            "problems": list(self.problems),
            "fallbacks": list(self.fallbacks),
            "help": list(self.help),
            "tp_that_work": list(self.working_tp),
            "memory": self.memory and self.memory.document(),
            "roof": self.roof and self.roof.document(),
            "launches": [launch.document() for launch in self.launches or ()],
            "refused": [
                {"op": e.op, "layers": e.layers, "format": e.format, "why": e.refusal}
                for e in self.layers
                if e.refusal is not None
            ],
            "not_planned": [{"op": op, "why": TORCH_ONLY} for op in self.not_planned],
        }


def plan(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig) -> Fit:
    """Everything but the compiles. Raises ConfigError for a call that means nothing."""
    if gpu.kind != "cuda":
        raise ConfigError(f"fit is about GPUs, not {gpu.name}", hint="--gpu gb10, rtx-pro-6000, h200, …")
    if tp < 1:
        raise ConfigError(f"--tp {tp}", hint="at least 1")
    slots, parts = all_slots(opened.parts), opened.parts
    working = tuple(n for n in SIZES if all(refusal(slot, n) is None for slot in slots))
    max_tokens = max(MAX_TOKENS, engine.max_batch_tokens)
    fit = Fit(opened.source, gpu, tp, working, max_tokens, tuple(_not_planned(opened)))
    if any(refusal(slot, tp) is not None for slot in slots):
        fit = dataclasses.replace(fit, refusal=_rule(opened.model, tp))
        return dataclasses.replace(fit, help=tuple(_other_sizes(opened, fit, engine)))
    memory = _memory(opened, gpu, tp, engine)
    fit = dataclasses.replace(
        fit,
        memory=memory,
        roof=roof(parts, memory.cache, gpu, tp, memory.context_tokens),
        layers=layers_for(opened, gpu, tp, engine),
    )
    return fit if fit.fits else dataclasses.replace(fit, help=tuple(_help(opened, fit, engine)))


def compiled(fit: Fit) -> Fit:
    """The same with its launches, compiled; nothing is compiled for a cut that the model does not allow."""
    if fit.refusal is not None:
        return fit
    found = launches.launches(fit.layers, fit.gpu, fit.max_tokens)
    return dataclasses.replace(fit, launches=found)


def _memory(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig) -> Memory:
    weights: dict[str, int] = {}
    for part in opened.parts:
        weights[part.name] = weights.get(part.name, 0) + part.shard_bytes(tp)
    model, dtype = opened.model, opened.build.dtype
    layers = layers_for(opened, gpu, tp, engine)
    return ledger(
        gpu,
        weights,
        cache_bytes(model.cache_specs, kv_dtype(opened.source, engine.kv_cache_dtype).itemsize, tp),
        launches.workspace_bytes(layers, gpu, engine.max_batch_tokens),
        Sizes(model.embedding.weight.shape[1], model.head.vocab, len(model.blocks), dtype.itemsize),
        engine,
        _context_tokens(opened.source, engine.context_length),
    )


def layers_for(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig) -> tuple[Layers, ...]:
    """What one of `tp` such GPUs launches of a model."""
    setting = Setting(gpu, tp, kv_dtype(opened.source, engine.kv_cache_dtype), engine.page_tokens)
    return launches.layers_of(opened.model, setting)


def _help(opened: Opened, fit: Fit, engine: EngineConfig) -> Iterator[str]:
    """What would fit instead, each for itself."""
    gpu, tp, memory = fit.gpu, fit.tp, fit.memory
    assert memory is not None
    yield from _other_sizes(opened, fit, engine)
    if not _all_run(opened, gpu, tp, engine):
        as_bf16 = dataclasses.replace(opened.source, dtype="bfloat16")
        if opened.source.dtype != "bfloat16" and _all_run(open_source(as_bf16, gpu), gpu, tp, engine):
            yield "--dtype bfloat16"
        return
    if _fits_with(opened, gpu, tp, engine, kv_cache_dtype="fp8"):
        yield "--kv-cache-dtype fp8"
    if memory.kv_tokens > 0:
        yield f"--context-length {memory.kv_tokens}"
    if _fits_with(opened, gpu, tp, engine, max_running_requests=1):
        yield "fewer --max-running-requests"


def _other_sizes(opened: Opened, fit: Fit, engine: EngineConfig) -> Iterator[str]:
    found = [
        n
        for n in fit.working_tp
        if n != fit.tp and _memory(opened, fit.gpu, n, engine).fits and _all_run(opened, fit.gpu, n, engine)
    ]
    if found:
        yield f"--tp {' or '.join(map(str, found))}"


def _all_run(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig) -> bool:
    """Are there kernels for all expert layers?"""
    layers = layers_for(opened, gpu, tp, engine)
    return all(alike.refusal is None for alike in layers if alike.op == cpu_moe_block.OP)


def _fits_with(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig, **other: Any) -> bool:
    """Would it fit with this one setting changed? A checkpoint may not allow it."""
    try:
        return _memory(opened, gpu, tp, dataclasses.replace(engine, **other)).fits
    except UnsupportedFormat:
        return False


def _problems(fit: Fit) -> Iterator[str]:
    if fit.refusal is not None:
        yield f"--tp {fit.tp}: {fit.refusal}"
    if fit.memory is not None and not fit.memory.fits:
        yield (
            f"{fit.memory.missing_bytes / GIB:.1f} GiB are missing on each GPU for one request of "
            f"{fit.memory.context_tokens} tokens"
        )
    for layers in fit.layers:
        if layers.refusal is not None and layers.op == cpu_moe_block.OP:
            yield f"no kernel runs the experts of {layers.layers} layers ({layers.format}): {layers.refusal}"
    for launch in fit.launches or ():
        compiled, planned = launch.compiled, launch.planned
        if compiled is not None and not compiled.fits:
            said = (
                compiled.error or f"{compiled.shared_bytes} bytes of shared memory of {compiled.limit_bytes}"
            )
            where = f"{launch.layers.op}, {planned.operation.name}: {planned.op}"
            yield f"{where} at {planned.first} to {planned.last} tokens: {said}"


def _fallbacks(fit: Fit) -> Iterator[str]:
    for op in fit.not_planned:
        if op != EMBEDDING:  # one gather, of which torch's is as good as any
            yield f"{op} is {TORCH_ONLY}"
    for layers in fit.layers:
        if layers.refusal is not None:
            yield f"{layers.op} of {layers.layers} layers falls back to torch operators: {layers.refusal}"
        for operation in layers.operations:
            if isinstance(operation, Library) and operation.problem != DENSE:
                yield f"{layers.op}, {operation.name} falls back to torch operators: {operation.problem}"
    for launch in fit.launches or ():
        if launch.emulated and launch.compiled is not None and launch.planned.request is not None:
            planned, wanted = launch.planned, " and ".join(launch.planned.request.declares)
            yield (
                f"{launch.layers.op}, {planned.operation.name}: {planned.op} at {planned.first} to "
                f"{planned.last} tokens is written for {wanted} and runs {launch.compiled.instruction}"
            )


def _rule(model: Decoder, tp: int) -> str:
    """What the weights' cuts say against it."""
    try:
        check_cuts(model, tp)
    except FireboxError as error:
        return f"{error}; {error.hint}"
    raise AssertionError(f"one kind of slot cannot be cut into {tp}, and yet all slots can")


def _not_planned(opened: Opened) -> Iterator[str]:
    """What no layer launches as a kernel of ours, under the names that the ledger uses."""
    yield EMBEDDING
    yield from dict.fromkeys(choice.op for choice in opened.build.choices if choice.op not in PLANNED)


def _context_tokens(source: Source, asked: int | None) -> int:
    made_for: int = need(source.config, "max_position_embeddings")
    if asked is None:
        return min(CONTEXT_TOKENS, made_for)
    if not 1 <= asked <= made_for:
        raise ConfigError(
            f"--context-length {asked}", hint=f"{source.name} was made for 1 to {made_for} tokens"
        )
    return asked
