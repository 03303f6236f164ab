"""Which problems a model has on one of `tp` GPUs, each once."""

from __future__ import annotations

from firebox.config import EngineConfig
from firebox.find import load
from firebox.hardware.base import Gpu
from firebox.layers import experts
from firebox.planning.fit import Source, layers_for, open_source
from firebox.tuning.run import Work

TUNED = {experts: ("moe", "experts")}  # who launches → what --op calls it, who tunes it


def works_of(source: Source, gpu: Gpu, tp: int, op: str) -> list[Work]:
    """The problems of `op` ("moe", "linear", "attention" or "all")."""
    layers: dict[tuple[str, object], int] = {}
    for alike in layers_for(open_source(source, gpu), gpu, tp, EngineConfig()):
        for operation in alike.operations:
            kind, file = TUNED.get(operation.source, ("", ""))
            if kind and op in (kind, "all"):
                key = (file, operation.problem)
                layers[key] = layers.get(key, 0) + alike.layers
    return [Work(load("tuning", file), problem, count) for (file, problem), count in layers.items()]
