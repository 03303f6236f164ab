"""What fit's findings come to, in sentences: what speaks against the model, what --strict refuses, and what
is planned although the engine does not do it yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels._blocks import MOE_BLOCK
from firebox.kernels.plan import Library, Setting
from firebox.layers.launches import Launch, Layers
from firebox.layers.linear import INTENDED
from firebox.planning.memory import GIB, Memory

TORCH_ONLY = "composed of torch operators on a GPU"


def problems(
    setting: Setting,
    refusal: str | None,
    memory: Memory | None,
    layers: Iterable[Layers],
    launches: Iterable[Launch],
) -> Iterator[str]:
    """Why it does not fit; nothing if it does, as far as was checked."""
    if refusal is not None:
        yield f"{options(setting)}: {refusal}"
    if memory is not None and not memory.fits:
        yield (
            f"{memory.missing_bytes / GIB:.1f} GiB are missing on each GPU for one request of "
            f"{memory.context_tokens} tokens"
        )
    for alike in layers:
        if alike.refusal is not None and alike.op == MOE_BLOCK:
            yield f"no kernel runs the experts of {alike.layers} layers ({alike.format}): {alike.refusal}"
    for launch in launches:
        if launch.problem is not None:
            yield launch.problem


def fallbacks(
    gpu: Gpu, not_planned: Iterable[str], layers: Iterable[Layers], launches: Iterable[Launch]
) -> Iterator[str]:
    """What --strict refuses."""
    for op in not_planned:
        yield f"{op} is {TORCH_ONLY}"
    for alike in layers:
        if alike.refusal is not None:
            yield f"{alike.op} of {alike.layers} layers falls back to torch operators: {alike.refusal}"
        for operation in alike.operations:
            if isinstance(operation, Library) and operation.problem not in INTENDED:
                yield f"{alike.op}, {operation.name} falls back to torch operators: {operation.problem}"
    launches = tuple(launches)
    for launch in launches:
        if launch.emulation is not None:
            yield launch.emulation
    missing = ((launch, launch.planned.untuned(gpu)) for launch in launches)
    yield from dict.fromkeys(
        f"{launch.layers.op}, {launch.planned.operation.name}: {why}" for launch, why in missing if why
    )


def tile(config: Mapping[str, Any]) -> str:
    """A configuration in words: a flag by its name alone; what is not set, not at all."""
    there = ((name, value) for name, value in config.items() if value is not False and value is not None)
    return " ".join(name if value is True else f"{name} {value}" for name, value in there)


def planned_only(setting: Setting) -> Iterator[str]:
    """What was planned for an engine that does not do it yet."""
    if setting.ep > 1:
        groups = setting.groups
        whose = f"; budgets and memory are those of one of {groups} groups of requests" if groups > 1 else ""
        yield f"--ep {setting.ep}: the engine does not divide experts among GPUs yet{whose}"
    if setting.drafts:
        unchecked = "the engine does not check drafts yet; what makes them is left out"
        yield f"--num-drafts {setting.drafts}: {unchecked}"


def options(setting: Setting) -> str:
    """How the model is divided, as the command line says it."""
    return f"--tp {setting.tp}" + (f" --ep {setting.ep}" if setting.ep > 1 else "")
