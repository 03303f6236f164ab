"""Which problems a model has on one of `tp` GPUs, each once."""

from __future__ import annotations

from firebox.find import load
from firebox.hardware.base import Gpu
from firebox.kernels.plan import Setting
from firebox.layers import experts
from firebox.planning.fit import Source, open_source
from firebox.planning.launches import layers_of
from firebox.tuning.run import Work

TUNED = {experts: ("moe", "experts")}  # who launches → what --op calls it, who tunes it


def works_of(source: Source, gpu: Gpu, tp: int, op: str) -> tuple[list[Work], list[str]]:
    """The problems of `op` ("moe", "linear", "attention" or "all"), and why layers have none."""
    found: dict[tuple[str, object], int] = {}
    refusals = dict[str, None]()
    for layers in layers_of(open_source(source, gpu).model, Setting(gpu, tp)):
        if layers.refusal is not None:
            refusals[f"{layers.op}: {layers.refusal}"] = None
        for operation in layers.operations:
            kind, file = TUNED.get(operation.source, ("", ""))
            if kind and op in (kind, "all"):
                key = (file, operation.problem)
                found[key] = found.get(key, 0) + layers.layers
    works = [Work(load("tuning", file), problem, count) for (file, problem), count in found.items()]
    return works, list(refusals)
