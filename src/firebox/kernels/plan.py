"""The launch plan: which compiled kernels a number of tokens launches, for every number of tokens.

    Operation   one thing that a layer does: a norm, a product, its experts
    Made        what so many tokens make of it: compiles, or a library's own kernel
    Planned     one compile, and the numbers of tokens that launch it
    Chosen      one choice, and the numbers of tokens for which it is made

What launches an operation says what it launches: `made` of layers/dense_gpu.py, layers/expert_paths.py,
layers/delta_gpu.py and attention/triton_paged.py, `request` of a kernel that has one compile, `variants` of
one that has a few. The engine asks the same functions when it launches. Between two of the numbers of tokens
that `turns` names `made` says the same, so the plan of thousands of numbers asks at some hundred of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch

from firebox.hardware.base import Gpu
from firebox.kernels._veto import Choice
from firebox.kernels.compile import CompileRequest

CUBLAS = "cublas"
Losers = tuple[tuple[str, str], ...]  # path → why it was not taken


@dataclass(frozen=True)
class Setting:
    """What layers are planned for: one of `gpus`, a cache that stores `kv_dtype` in pages of `page_tokens`.

    `tp` GPUs share whatever is not a routed expert. The routed experts are shared out, whole, among `ep`
    places. With fewer places than GPUs, those of a place cut each expert among them (`expert_tp`). With more
    places than `tp`, there are several `groups` of `tp` GPUs with requests of their own, whose tokens meet at
    the experts. One of `tp` and `ep` is a multiple of the other. `drafts`: tokens beside its own that a
    request's decode step checks."""

    gpu: Gpu
    tp: int = 1
    kv_dtype: torch.dtype = torch.bfloat16
    page_tokens: int = 64  # config.GPU_PAGE_TOKENS, which kernels do not know
    ep: int = 1
    drafts: int = 0

    @property
    def gpus(self) -> int:
        """All of them."""
        return max(self.tp, self.ep)

    @property
    def expert_tp(self) -> int:
        """GPUs that share one expert."""
        return max(1, self.tp // self.ep)

    @property
    def groups(self) -> int:
        """Groups of `tp` GPUs with requests of their own."""
        return max(1, self.ep // self.tp)


@dataclass(frozen=True)
class Compile:
    """One launch. `request` None: a library's kernel, which is not ours to compile. `config`: what was chosen
    for it, a kernel's Config or None. `variant` tells apart compiles that one number of tokens may launch
    under the same name. `choice`: what to veto so that something else is launched; None where nothing could
    be."""

    op: str
    request: CompileRequest | None
    config: Any = None
    variant: str = ""
    choice: Choice | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """The configuration by name."""
        if self.request is None:
            return {}
        if is_dataclass(self.config) and not isinstance(self.config, type):
            return asdict(self.config)
        return {"warps": self.request.num_warps, "stages": self.request.num_stages}


@dataclass(frozen=True)
class Made:
    """What some number of tokens launches of an operation. `path` and `why` of the choice; `losers`: the
    other paths, where there are any."""

    path: str
    why: str
    compiles: tuple[Compile, ...]
    losers: Losers = ()


@dataclass(frozen=True)
class Operation:
    """`name`: what the layer calls it; `format`: of its weights, or of what it computes in. `source`: the
    module whose `made(problem, tokens, gpu)` says what is launched, and whose `turns(problem, max_tokens,
    gpu)` from which numbers of tokens on that may be something else; `TUNED` in it is the file of
    tuned/<gpu>/ that its configurations come from, if they come from one, and `key(problem)` its entry there;
    without `TUNED_EVERYWHERE` a GPU need not have such a file. `times`: as many tokens as in a
    step of one group of GPUs may meet here."""

    name: str
    format: str
    source: Any
    problem: Any
    times: int = 1

    def made(self, tokens: int, gpu: Gpu) -> Made:
        """The same object for numbers of tokens that share everything, as far as is cheap."""
        found: Made = self.source.made(self.problem, tokens, gpu)
        return found

    def turns(self, max_tokens: int, gpu: Gpu) -> Iterable[int]:
        """The numbers of tokens, among others and in any order, at which `made` says something else than for
        one token less."""
        found: Iterable[int] = self.source.turns(self.problem, max_tokens, gpu)
        return found


@dataclass(frozen=True)
class Single(Operation):
    """An operation of one compile, `request(problem, gpu)` of the kernel `source`, for any number of
    tokens."""

    def made(self, tokens: int, gpu: Gpu) -> Made:
        """See Operation."""
        return _single(self.source, self.problem, gpu)

    def turns(self, max_tokens: int, gpu: Gpu) -> Iterable[int]:
        """There are none."""
        return ()


@dataclass(frozen=True)
class Variants(Operation):
    """An operation of the same compiles for any number of tokens, `variants(problem, gpu)` of the kernel
    `source`, of which each launch is one."""

    def made(self, tokens: int, gpu: Gpu) -> Made:
        """See Operation."""
        return _variants(self.source, self.problem, gpu)

    def turns(self, max_tokens: int, gpu: Gpu) -> Iterable[int]:
        """There are none."""
        return ()


@dataclass(frozen=True)
class Library(Operation):
    """A product that torch gives to cuBLAS; `problem` says why."""

    def made(self, tokens: int, gpu: Gpu) -> Made:
        """See Operation."""
        return _library(self.problem)

    def turns(self, max_tokens: int, gpu: Gpu) -> Iterable[int]:
        """There are none."""
        return ()


@dataclass(frozen=True)
class Planned:
    """One launch and the numbers of tokens, `first` … `last`, that make it. A reason of `losers` that does
    not hold from `first` on says from where it does."""

    operation: Operation
    compile: Compile
    first: int
    last: int
    path: str
    why: str
    losers: Losers = ()

    @property
    def op(self) -> str:
        """The launch's name."""
        return self.compile.op

    @property
    def request(self) -> CompileRequest | None:
        """What is compiled; None for a library's kernel."""
        return self.compile.request

    @property
    def config(self) -> dict[str, Any]:
        """What was chosen for it."""
        return self.compile.chosen

    def untuned(self, gpu: Gpu) -> str | None:
        """Which entry of a tuned file is missing, where a default configuration was taken for want of it;
        None where there is one, or where no file has any."""
        source = self.operation.source
        file: str | None = getattr(source, "TUNED", None)
        if file is None or self.request is None or not self.why.startswith("default"):
            return None
        from firebox.kernels import _tuned

        key = source.key(self.operation.problem)
        if not getattr(source, "TUNED_EVERYWHERE", True):
            there = _tuned.keys(gpu.name, file)
            if not there or key in there:  # by rule, or a tuned tile is there and serves other requests
                return None
        return f"default tiles: tuned/{_tuned.folder(gpu.name)}/{file}.json has no entry for {key!r}"


@dataclass(frozen=True)
class Chosen:
    """One choice of an operation, and the numbers of tokens, `first` … `last`, for which it is made."""

    operation: Operation
    first: int
    last: int
    path: str
    why: str
    losers: Losers


def chosen(operation: Operation, gpu: Gpu, max_tokens: int) -> list[Chosen]:
    """What steps of 1 … `max_tokens` tokens choose, successive numbers that choose alike together, whatever
    their tiles are."""
    found: list[Chosen] = []
    for first, last, made in _runs(operation, gpu, max_tokens * operation.times):
        before = found[-1] if found else None
        if before and (before.path, before.why, before.losers) == (made.path, made.why, made.losers):
            found[-1] = replace(before, last=last)
        else:
            found.append(Chosen(operation, first, last, made.path, made.why, made.losers))
    return found


def planned(operation: Operation, gpu: Gpu, max_tokens: int) -> list[Planned]:
    """Every launch that steps of 1 … `max_tokens` tokens can make, successive numbers that share one
    together, with the path and the reason of the first. Numbers of a row are tokens at the operation."""
    rows: list[Planned] = []
    open_rows: dict[tuple[str, str], int] = {}  # (name, variant) → the index of its latest row
    for first, last, made in _runs(operation, gpu, max_tokens * operation.times):
        for compile in made.compiles:
            key = (compile.op, compile.variant)
            at = open_rows.get(key)
            before = rows[at] if at is not None else None
            if at is not None and before is not None and _continues(before, compile, first):
                rows[at] = replace(before, last=last, losers=_both(before, made, first))
            else:
                open_rows[key] = len(rows)
                rows.append(Planned(operation, compile, first, last, made.path, made.why, made.losers))
    return rows


def all_requests(operations: Sequence[Operation], gpu: Gpu, max_tokens: int) -> list[CompileRequest]:
    """Everything that is compiled for these operations."""
    rows = (row for operation in operations for row in planned(operation, gpu, max_tokens))
    return [row.request for row in rows if row.request is not None]


def _runs(operation: Operation, gpu: Gpu, max_tokens: int) -> Iterator[tuple[int, int, Made]]:
    """Successive numbers of tokens that make the very same."""
    first, before = 1, operation.made(1, gpu)
    for tokens in sorted({n for n in operation.turns(max_tokens, gpu) if 1 < n <= max_tokens}):
        made = operation.made(tokens, gpu)
        if made is not before:
            yield first, tokens - 1, before
            first, before = tokens, made
    yield first, max_tokens, before


def _continues(before: Planned, compile: Compile, tokens: int) -> bool:
    return before.last == tokens - 1 and before.request == compile.request


def _both(before: Planned, made: Made, tokens: int) -> Losers:
    """Of a row that goes on with `tokens`."""
    if before.losers == made.losers:
        return before.losers
    found = dict(before.losers)
    for path, why in (*made.losers, (made.path, "taken")):
        from_here, known = f"from {tokens} tokens: {why}", found.get(path)
        if known is None:
            found[path] = from_here
        elif known != why and not known.endswith(f" tokens: {why}"):
            found[path] = f"{known}; {from_here}"
    found.pop(before.path, None)
    return tuple(found.items())


@functools.cache
def _single(kernel: Any, problem: Any, gpu: Gpu) -> Made:
    request = kernel.request(problem, gpu)
    return Made("one", "default", (Compile(kernel.OP, request),))


@functools.cache
def _variants(kernel: Any, problem: Any, gpu: Gpu) -> Made:
    return Made("one", "default", kernel.variants(problem, gpu))


@functools.cache
def _library(why: str) -> Made:
    return Made(CUBLAS, why, (Compile("linear", None),))
