"""What is tuned: tasks, candidates, and what each operation (tuning/experts.py, tuning/linear.py) must say.

A task is one problem at one number of tokens. Its result is a path, and a tile for every part of that path:
an expert layer has the paths one (of one token), few and sorted with the parts gate_up and down, a linear
layer the paths one, few, many and cublas with one part. Parts are launches of their own and are tuned
separately.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Protocol

from firebox.hardware.base import Gpu
from firebox.kernels.compile import Compiled, CompileRequest


@dataclass(frozen=True)
class Task:
    """`op`: who tunes it, a file of tuning/; `key`: the problem as files in tuned/ call it."""

    op: str
    key: str
    problem: Any
    tokens: int

    def __str__(self) -> str:
        return f"{self.op} {self.key}, {self.tokens} tokens"


@dataclass(frozen=True)
class Candidate:
    """One tile of one part of one path. `config` is the kernel's; `request` None: a library's kernel.
    `unproven`: whether it runs, and how its estimate is, shows only where it has run; it is never predicted,
    and never a reason to leave another path out."""

    path: str
    part: str
    config: Any
    request: CompileRequest | None = field(compare=False)
    unproven: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """Tells candidates of a task apart, also in files: path, part, and the numbers of the config."""
        return f"{self.path} {self.part} {' '.join(f'{k}={v}' for k, v in self.numbers.items())}".strip()

    @functools.cached_property
    def code(self) -> str:
        """See code_of; "" for a library's."""
        return "" if self.request is None else code_of(self.request)

    @functools.cached_property
    def numbers(self) -> dict[str, Any]:
        """The config by name; nothing for a library's."""
        known = is_dataclass(self.config) and not isinstance(self.config, type)
        return asdict(self.config) if known else {}


def code_of(r: CompileRequest) -> str:
    """Equal for requests, of any task, that come to the same compiled code."""
    constants = sorted((name, repr(value)) for name, value in r.constexprs.items())
    sizes = (r.num_warps, r.num_stages, sorted(r.options.items()))
    arguments = (sorted(r.signature.items()), sorted(r.aligned))
    return repr((r.kernel.cache_key, arguments, constants, sizes, r.gpu.name))


@dataclass(frozen=True)
class Option:
    """One way to run a task: a path with a candidate for each part. `us`: of all its launches."""

    path: str
    parts: Mapping[str, Candidate]
    us: float


class Bench(Protocol):
    """A task on this process's GPU: data that no call finds in the L2, and the oracle."""

    def error(self, candidate: Candidate) -> tuple[float, float]:
        """Relative error of one run whose outputs were filled with NaN before, and the most it may be."""
        ...

    def calls(self, candidate: Candidate) -> list[Callable[[], None]]:
        """Launches of the candidate, each on data of its own."""
        ...

    def further(self, path: str, parts: Mapping[str, Candidate]) -> list[Callable[[], None]]:
        """What this path launches besides, such as sorting; nothing if there is nothing."""
        ...

    def whole(self, path: str, parts: Mapping[str, Candidate]) -> list[Callable[[], None]]:
        """The whole operation as the engine runs it."""
        ...


class Tunable(Protocol):
    """What a file of tuning/ offers for its operation."""

    OP: str
    FILE: str

    def candidates(self, task: Task, gpu: Gpu) -> Iterator[Candidate]:
        """Everything worth compiling, the stock choice included."""
        ...

    def stock(self, task: Task, gpu: Gpu) -> Option:
        """What runs without a tuned entry."""
        ...

    def estimate_us(self, task: Task, candidate: Candidate, compiled: Compiled | None, gpu: Gpu) -> float:
        """How long the candidate should take; before it is compiled, a guess."""
        ...

    def further_requests(self, task: Task, gpu: Gpu) -> Iterator[CompileRequest]:
        """What benches launch beside candidates, so that it is compiled beforehand too."""
        ...

    def further_us(self, task: Task, path: str, parts: Mapping[str, Candidate], gpu: Gpu) -> float:
        """How long what the path launches besides should take."""
        ...

    def roof_us(self, task: Task, path: str, gpu: Gpu) -> float:
        """The least time of the whole operation on this path, by the GPU's bandwidth and rates."""
        ...

    def options(self, task: Task, ranked: Mapping[tuple[str, str], Sequence[Candidate]]) -> Iterator[Option]:
        """The combinations of parts worth weighing, without times; `ranked`: (path, part) → best first."""
        ...

    def entry(self, option: Option) -> dict[str, Any]:
        """The option as a file in tuned/ writes it, without its time."""
        ...

    def bench(self, problem: Any, gpu: Gpu) -> Callable[[int], Bench]:
        """Makes the weights once; tokens → the bench of a task."""
        ...
