"""Where a tuning run compiles and measures: on this machine, or over a Ray cluster (the extra `cluster`),
where compiles go to all CPUs and every GPU measures problems of its own. What comes out is the same.

A compile request travels as plain data, its kernel by name: Triton's functions do not pickle. The machines
must have the same version of this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from firebox.errors import ConfigError
from firebox.find import load
from firebox.hardware.base import Gpu
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort
from firebox.tuning.search import Meter, compile_here
from firebox.tuning.worker import Worker

LOCAL = "local"  # as an address: a cluster of this machine alone
BATCH = 8  # compiles that travel together
Compile = Callable[[Sequence[CompileRequest], bool], list[Compiled]]


@dataclasses.dataclass(frozen=True)
class Places:
    """`compile`: requests and whether to keep the binaries → results; `meters`: one for each GPU that may
    measure, none to predict."""

    compile: Compile
    meters: tuple[Meter, ...]


@contextmanager
def this_machine(gpu: Gpu, *, measure: bool) -> Iterator[Places]:
    """This machine's cores and, if it is to measure, its GPU."""
    if not measure:
        yield Places(compile_here, ())
        return
    with Worker(gpu) as worker:
        yield Places(compile_here, (worker,))


@contextmanager
def cluster(address: str, gpu: Gpu, *, measure: bool) -> Iterator[Places]:
    """A Ray cluster's CPUs and, if it is to measure, its GPUs, which must all be like `gpu`. `address`: as
    ray.init takes it, or "local". Raises ConfigError without Ray, or without a GPU to measure on."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray", hint="pip install 'firebox[cluster]'") from error
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    try:
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(there.get("GPU", 0)) if measure else 0
        if measure and not gpus:
            raise ConfigError(f"the cluster at {address} has no GPU", hint="--predict works without one")
        remote = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_compiled)
        actors = [ray.remote(num_gpus=1)(_Remote).remote(gpu) for _ in range(gpus)]
        yield Places(lambda requests, keep: _over(ray, remote, requests, keep), tuple(map(_Meter, actors)))
    finally:
        ray.shutdown()


def _over(ray: Any, remote: Any, requests: Sequence[CompileRequest], keep: bool) -> list[Compiled]:
    plain = [portable(request) for request in requests]
    batches = [plain[first : first + BATCH] for first in range(0, len(plain), BATCH)]
    found = ray.get([remote.remote(batch, keep) for batch in batches])
    return [compiled for batch in found for compiled in batch]


def _compiled(batch: Sequence[dict[str, Any]], keep: bool) -> list[Compiled]:
    """Runs on a machine of the cluster."""
    return compile_all([restored(plain) for plain in batch], workers=1, keep_binaries=keep)


class _Remote:
    """Lives on a machine of the cluster, with one GPU to itself; candidates come by name."""

    def __init__(self, gpu: Gpu) -> None:
        self._worker = Worker(gpu)

    def samples(
        self, task: Task, names: Sequence[tuple[str, str, Any]], effort: Effort
    ) -> list[list[float] | str]:
        return self._worker.samples(task, [Candidate(*name, None) for name in names], effort)

    def further(
        self, task: Task, path: str, parts: dict[str, tuple[str, str, Any]], effort: Effort
    ) -> list[float] | str:
        option = Option(path, {part: Candidate(*name, None) for part, name in parts.items()}, 0.0)
        return self._worker.further(task, option, effort)


class _Meter:
    """See search.Meter: asks a _Remote."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> list[list[float] | str]:
        import ray

        names = [(c.path, c.part, c.config) for c in candidates]
        found: list[list[float] | str] = ray.get(self._actor.samples.remote(task, names, effort))
        return found

    def further(self, task: Task, option: Option, effort: Effort) -> list[float] | str:
        import ray

        parts = {part: (c.path, c.part, c.config) for part, c in option.parts.items()}
        found: list[float] | str = ray.get(self._actor.further.remote(task, option.path, parts, effort))
        return found


def portable(request: CompileRequest) -> dict[str, Any]:
    """The request as plain data."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    fields["kernel"] = _named(request.kernel)
    fields["constexprs"] = {name: _plain(value) for name, value in request.constexprs.items()}
    return fields


def restored(plain: dict[str, Any]) -> CompileRequest:
    """What `portable` was given."""
    constexprs = {name: _value(value) for name, value in plain["constexprs"].items()}
    return CompileRequest(**(plain | {"kernel": _found(plain["kernel"]), "constexprs": constexprs}))


def _named(function: Any) -> str:
    return f"{function.__module__}:{function.__name__}"


def _found(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(load("kernels", module.rpartition(".")[2]), attribute)


def _plain(value: Any) -> tuple[str, Any]:
    return ("function", _named(value)) if hasattr(value, "cache_key") else ("value", value)


def _value(plain: tuple[str, Any]) -> Any:
    kind, value = plain
    return _found(value) if kind == "function" else value
