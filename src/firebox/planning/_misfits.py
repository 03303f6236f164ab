"""What would help where a launch asks for more shared memory than a block gets, or does not compile: a tile
that fits, as the compiler says, who finds such tiles, and keys and values in another type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from firebox.errors import ConfigError, UnsupportedFormat
from firebox.hardware.base import Gpu
from firebox.kernels import _attention
from firebox.kernels.compile import compile_all
from firebox.kernels.plan import CUBLAS, Compile, Made, Operation, Planned, Setting
from firebox.layers.launches import Launch
from firebox.planning._parts import Source, kv_dtype
from firebox.planning._verdict import tile

if TYPE_CHECKING:
    from firebox.kernels.compile import Compiled

ATTENTION = "attention"
OPS = {"experts": "moe", "linear": "linear", ATTENTION: "attention"}  # a source's TUNED → --op of tune
KV_FORMATS = ("fp8", "bf16")


def help_for(source: Source, setting: Setting, launches: Iterable[Launch]) -> Iterator[str]:
    """One sentence for each tile that does not fit and has one nearby that does; then what else makes the
    operations fit. Compiles tiles until one fits."""
    misfits = [launch for launch in launches if launch.problem is not None]
    tuned: dict[str, bool] = {}  # --op → may a prediction stand in
    for launch in _of_each_tile(misfits):
        planned = launch.planned
        op = OPS.get(_file(planned))
        if op is None:
            continue
        found = _another(planned, setting.gpu)
        if found is not None:
            yield _sentence(launch, *found)
            tuned[op] = tuned.get(op, True) and not planned.why.startswith("measured")
    if setting.ep == 1:  # whose share is another than the tuner's
        yield from (_tune(source, setting, op, predict=predict) for op, predict in tuned.items())
    attention = [launch.planned for launch in misfits if _file(launch.planned) == ATTENTION]
    for name in KV_FORMATS if attention else ():
        if _fit_in(name, attention, source, setting):
            yield f"--kv-cache-dtype {name}"


def _of_each_tile(misfits: Iterable[Launch]) -> Iterator[Launch]:
    """The first launch of each tile of an operation."""
    seen = set()
    for launch in misfits:
        planned = launch.planned
        kind = (planned.operation, planned.op, tile(planned.config))
        if kind not in seen:
            seen.add(kind)
            yield launch


def _file(planned: Planned) -> str:
    """Of tuned/<gpu>/, whose tiles the operation takes; "" if it is none's."""
    operation = planned.operation
    return getattr(operation.source, "TUNED", "") if type(operation) is Operation else ""


def _another(planned: Planned, gpu: Gpu) -> tuple[Compile, Compiled | None] | None:
    """The launch with a tile that fits, or by a library; None if there is neither."""
    operation = planned.operation
    made: Made = operation.source.nearest_fit(operation.problem, planned.last, gpu)
    others = [c for c in made.compiles if c.op == planned.op and c.request != planned.request]
    for other in others:
        if other.request is None:
            return other, None
        [compiled] = compile_all([other.request])
        if compiled.fits:
            return other, compiled
    return None


def _sentence(launch: Launch, other: Compile, compiled: Compiled | None) -> str:
    planned, asked = launch.planned, launch.compiled
    assert asked is not None
    without = asked.error or f"{asked.shared_bytes:,} bytes"
    better = CUBLAS
    if compiled is not None:
        better = f"{tile(other.chosen)}, which takes {compiled.shared_bytes:,} bytes of shared memory,"
    return f"{launch.where} with {better} instead of {tile(planned.config)} ({without})"


def _tune(source: Source, setting: Setting, op: str, *, predict: bool) -> str:
    further = " --requantize fp8" if source.requantise else ""
    how = " --predict" if predict else ", on that GPU"  # a prediction replaces no measurement
    return (
        f"firebox tune {source.name} --gpu {setting.gpu.name} --tp {setting.tp} --dtype {source.dtype}"
        f"{further} --op {op}{how}"
    )


def _fit_in(name: str, attention: Iterable[Planned], source: Source, setting: Setting) -> bool:
    """Does all of `attention` fit, with keys and values in another type than now?"""
    try:
        dtype = kv_dtype(source, name)
    except (ConfigError, UnsupportedFormat):
        return False
    if dtype == setting.kv_dtype:
        return False
    operations = {
        replace(row.operation, problem=replace(row.operation.problem, kv_dtype=dtype)): row.last
        for row in attention
    }
    if any(_attention.declined(operation.problem, setting.gpu) for operation in operations):
        return False
    made = [operation.made(tokens, setting.gpu) for operation, tokens in operations.items()]
    requests = [
        compile.request for found in made for compile in found.compiles if compile.request is not None
    ]
    return all(compiled.fits for compiled in compile_all(requests))
