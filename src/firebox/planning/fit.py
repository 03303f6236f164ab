"""`firebox fit MODEL`: would this model run on GPUs that need not be here, and how fast could it be?

    open_source(source, gpu) → Opened       the model without memory
    plan(opened, gpu, tp, engine) → Fit     memory and roof; also with experts divided, and with drafts
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
from firebox.kernels._blocks import ATTENTION_BLOCK, DENSE_BLOCK, HEAD, MOE_BLOCK
from firebox.kernels.plan import Chosen, Setting
from firebox.layers import gated_delta, latent_attention, launches
from firebox.layers.launches import Launch, Layers
from firebox.models.base import need
from firebox.planning import _misfits, _verdict
from firebox.planning._parts import Opened, Source, kv_dtype, open_source, refused
from firebox.planning._verdict import TORCH_ONLY
from firebox.planning.memory import Memory, Sizes, cache_bytes, ledger, step_tokens
from firebox.planning.roof import Roof, roof
from firebox.weights.cuts import SIZES, check_cuts

__all__ = ["Fit", "Opened", "Source", "compiled", "open_source", "plan"]

CONTEXT_TOKENS = 4096  # unless --context-length says otherwise
MAX_TOKENS = 8192  # launches are planned for at least so many tokens a step
PLANNED = (
    ATTENTION_BLOCK,
    MOE_BLOCK,
    DENSE_BLOCK,
    HEAD,
    latent_attention.OP,
    gated_delta.OP,
)
MOST_DRAFTS = 15  # with its own token what attention takes for decode (attention_decode.MAX_QUERIES)


@dataclass(frozen=True)
class Fit:
    """The answer. `refusal`: why the model cannot be cut this way; memory and roof are then None. `launches`
    None: not compiled. `not_planned`: operations that are composed of torch operators. `help`: what would
    make it fit."""

    source: Source
    setting: Setting
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
    def gpu(self) -> Gpu:
        """Of which there are `setting.gpus`."""
        return self.setting.gpu

    @property
    def tp(self) -> int:
        """GPUs that share whatever is not a routed expert."""
        return self.setting.tp

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not fit, one sentence each; empty if it does, as far as was checked."""
        return tuple(
            _verdict.problems(self.setting, self.refusal, self.memory, self.layers, self.launches or ())
        )

    @property
    def fits(self) -> bool:
        """Nothing that was checked speaks against it."""
        return not self.problems

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What --strict refuses, one sentence each: layers that fall back to torch operators, launches
        written for a tensor instruction that the compiler did not use, and default tiles for want of tuned
        ones. The last two once the launches are `compiled`."""
        found = _verdict.fallbacks(self.gpu, self.not_planned, self.layers, self.launches or ())
        return tuple(found)

    @property
    def choices(self) -> tuple[tuple[Layers, Chosen], ...]:
        """What steps choose, by their number of tokens, and why nothing else."""
        return tuple(launches.choices(self.layers, self.gpu, self.max_tokens))

    @property
    def planned_only(self) -> tuple[str, ...]:
        """What the answer is about although the engine does not do it yet."""
        return tuple(_verdict.planned_only(self.setting))

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
            "ep": self.setting.ep,
            "gpus": self.setting.gpus,
            "num_drafts": self.setting.drafts,
            "requantize": "fp8" if self.source.requantise else "none",
            "planned_only": list(self.planned_only),
            "checked": list(self.checked),
            "problems": list(self.problems),
            "fallbacks": list(self.fallbacks),
            "help": list(self.help),
            "tp_that_work": list(self.working_tp),
            "memory": self.memory and self.memory.document(),
            "roof": self.roof and self.roof.document(),
            "launches": [launch.document() for launch in self.launches or ()],
            "choices": [
                {
                    "layer": layers.op,
                    "layers": layers.layers,
                    "operation": choice.operation.name,
                    "tokens": [choice.first, choice.last],
                    "path": choice.path,
                    "why": choice.why,
                    "losers": dict(choice.losers),
                }
                for layers, choice in self.choices
            ],
            "refused": [
                {"op": e.op, "layers": e.layers, "format": e.format, "why": e.refusal}
                for e in self.layers
                if e.refusal is not None
            ],
            "not_planned": [{"op": op, "why": TORCH_ONLY} for op in self.not_planned],
        }


def plan(opened: Opened, gpu: Gpu, tp: int, engine: EngineConfig, *, ep: int = 1, drafts: int = 0) -> Fit:
    """Everything but the compiles. `ep` and `drafts` as in kernels.plan.Setting. Raises ConfigError for a
    call that means nothing."""
    if gpu.kind != "cuda":
        raise ConfigError(f"fit is about GPUs, not {gpu.name}", hint="--gpu gb10, rtx-pro-6000, h200, …")
    for name, value in (("--tp", tp), ("--ep", ep)):
        if value < 1:
            raise ConfigError(f"{name} {value}", hint="at least 1")
    if tp % ep and ep % tp:
        raise ConfigError(f"--tp {tp} with --ep {ep}", hint="one of them a multiple of the other")
    if not 0 <= drafts <= MOST_DRAFTS:
        raise ConfigError(f"--num-drafts {drafts}", hint=f"0 to {MOST_DRAFTS}")
    engine, kv = engine.on(gpu), kv_dtype(opened.source, engine.kv_cache_dtype)
    setting = Setting(gpu, tp, kv, engine.tokens_a_page, ep, drafts)
    working = tuple(n for n in SIZES if refused(opened.parts, n, ep) is None)
    max_tokens = max(MAX_TOKENS, step_tokens(engine, drafts))
    fit = Fit(opened.source, setting, working, max_tokens, tuple(_not_planned(opened)))
    if refused(opened.parts, tp, ep) is not None:
        fit = dataclasses.replace(fit, refusal=_rule(opened, tp, ep))
        return dataclasses.replace(fit, help=tuple(_other_sizes(opened, fit, engine)))
    memory = _memory(opened, setting, engine)
    fit = dataclasses.replace(
        fit,
        memory=memory,
        roof=roof(opened.parts, memory.cache, gpu, tp, memory.context_tokens, ep),
        layers=launches.layers_of(opened.model, setting),
    )
    return fit if fit.fits else dataclasses.replace(fit, help=tuple(_help(opened, fit, engine)))


def compiled(fit: Fit) -> Fit:
    """The same with its launches, compiled; nothing is compiled for a cut that the model does not allow."""
    if fit.refusal is not None:
        return fit
    found = launches.launches(fit.layers, fit.gpu, fit.max_tokens)
    helps = (*fit.help, *_misfits.help_for(fit.source, fit.setting, found))
    return dataclasses.replace(fit, launches=found, help=helps)


def _memory(opened: Opened, setting: Setting, engine: EngineConfig) -> Memory:
    weights: dict[str, int] = {}
    for part in opened.parts:
        weights[part.name] = weights.get(part.name, 0) + part.kept_bytes(setting)
    model, dtype = opened.model, opened.build.dtype
    layers = launches.layers_of(model, setting)
    return ledger(
        setting.gpu,
        weights,
        cache_bytes(model.cache_specs, setting.kv_dtype.itemsize, setting.tp),
        launches.workspace_bytes(layers, setting.gpu, step_tokens(engine, setting.drafts)),
        Sizes(model.embedding.weight.shape[1], model.head.vocab, len(model.blocks), dtype.itemsize),
        engine,
        _context_tokens(opened.source, engine.context_length),
        setting.drafts,
    )


def _help(opened: Opened, fit: Fit, engine: EngineConfig) -> Iterator[str]:
    """What would fit instead, each for itself."""
    setting, memory = fit.setting, fit.memory
    assert memory is not None
    yield from _other_sizes(opened, fit, engine)
    if not _all_run(opened, setting):
        as_bf16 = dataclasses.replace(opened.source, dtype="bfloat16")
        if opened.source.dtype != "bfloat16" and _all_run(open_source(as_bf16, fit.gpu), setting):
            yield "--dtype bfloat16"
        return
    if _fits_with(opened, setting, engine, kv_cache_dtype="fp8"):
        yield "--kv-cache-dtype fp8"
    if memory.kv_tokens > 0:
        yield f"--context-length {memory.kv_tokens}"
    if _fits_with(opened, setting, engine, max_running_requests=1):
        yield "fewer --max-running-requests"


def _other_sizes(opened: Opened, fit: Fit, engine: EngineConfig) -> Iterator[str]:
    others = (dataclasses.replace(fit.setting, tp=n) for n in fit.working_tp if n != fit.tp)
    found = [
        str(other.tp) for other in others if _memory(opened, other, engine).fits and _all_run(opened, other)
    ]
    if found:
        yield f"--tp {' or '.join(found)}"


def _all_run(opened: Opened, setting: Setting) -> bool:
    """Are there kernels for all expert layers?"""
    layers = launches.layers_of(opened.model, setting)
    return all(alike.refusal is None for alike in layers if alike.op == MOE_BLOCK)


def _fits_with(opened: Opened, setting: Setting, engine: EngineConfig, **other: Any) -> bool:
    """Would it fit with this one setting changed? A checkpoint may not allow it."""
    engine = dataclasses.replace(engine, **other)
    try:
        kv = kv_dtype(opened.source, engine.kv_cache_dtype)
    except UnsupportedFormat:
        return False
    return _memory(opened, dataclasses.replace(setting, kv_dtype=kv), engine).fits


def _rule(opened: Opened, tp: int, ep: int) -> str:
    """What speaks against such a division."""
    try:
        check_cuts(opened.model, tp)
    except FireboxError as error:
        if ep == 1:
            return f"{error}; {error.hint}"
    return str(refused(opened.parts, tp, ep))


def _not_planned(opened: Opened) -> Iterator[str]:
    """What no layer launches as a kernel of ours, under the names that the ledger uses."""
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
