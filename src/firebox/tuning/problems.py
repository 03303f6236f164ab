"""What there is to tune of a model on one GPU: the problems of its operations (layers/launches.py), each
once. Operations that no kernel here runs have none.

    layers_of(model, setting)                 layers/launches.py: a rank's operations
    problems_of(layers, ops)                  → (module, problem)
    works_of(source, gpu, tp, op)             all of it, from a model's name on
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

from firebox.attention import triton_paged
from firebox.config import EngineConfig
from firebox.errors import ConfigError
from firebox.hardware.base import Gpu
from firebox.kernels.plan import Operation
from firebox.layers import dense_gpu, expert_paths
from firebox.layers.launches import Layers
from firebox.planning.fit import Source, open_source, plan
from firebox.tuning import attention, experts, linear
from firebox.tuning.base import Task, Tunable
from firebox.tuning.run import Work


class Module(Tunable, Protocol):
    """A file of this room that tunes an operation."""

    def task(self, problem: Any, tokens: int) -> Task:
        """One problem at one number of tokens, under the key that its file in tuned/ has."""
        ...


MODULES: dict[str, Module] = {"moe": experts, "linear": linear, "attention": attention}
ALL = "all"


def problems_of(layers: Iterable[Layers], ops: str = ALL) -> list[tuple[Module, Any]]:
    """The problems of `ops`, a key of MODULES or ALL, by module and in the order of a step. Of problems that
    files in tuned/ do not tell apart, such as with and without bias, the first. Raises ConfigError."""
    if ops not in (*MODULES, ALL):
        raise ConfigError(f"--op {ops}", hint=f"there are: {', '.join((*MODULES, ALL))}")
    operations = dict.fromkeys(operation for alike in layers for operation in alike.operations)
    found: dict[tuple[str, str], tuple[Module, Any]] = {}
    for name in MODULES if ops == ALL else (ops,):
        module = MODULES[name]
        for operation in operations:
            for problem in _problems(name, operation):
                found.setdefault((name, module.task(problem, 1).key), (module, problem))
    return list(found.values())


def _problems(name: str, operation: Operation) -> Iterator[Any]:
    """What module `name` tunes of an operation. A Library has a kernel's module for its source, too."""
    if type(operation) is not Operation:
        return
    if (name, operation.source) in (("moe", expert_paths), ("linear", dense_gpu)):
        yield _alone(operation.problem)
    elif name == "attention" and operation.source is triton_paged:
        yield from attention.problems(operation.problem)


def works_of(source: Source, gpu: Gpu, tp: int, op: str) -> tuple[list[Work], list[str]]:
    """The problems of a model for `firebox tune`, with how many layers have each; why others have none.
    Raises ConfigError for a cut that the weights do not allow."""
    fit = plan(open_source(source, gpu), gpu, tp, EngineConfig())
    if fit.refusal is not None:
        raise ConfigError(f"--tp {tp}: {fit.refusal}")
    layers = fit.layers
    works = [
        Work(module, problem, sum(alike.layers for alike in layers if _has(alike, problem)))
        for module, problem in problems_of(layers, op)
    ]
    refusals = (f"{alike.op}: {alike.refusal}" for alike in layers if alike.refusal is not None)
    return works, list(dict.fromkeys(refusals))


def _has(layers: Layers, problem: Any) -> bool:
    of = getattr(problem, "layer", problem)
    return any(_alone(operation.problem) == of for operation in layers.operations)


def _alone(problem: Any) -> Any:
    """A problem as it is measured: without a norm before it, it rounds its activations itself."""
    return replace(problem, normed=False) if getattr(problem, "normed", False) else problem
