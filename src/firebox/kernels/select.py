"""Which kernel runs an operation, and why: asks every kernel of the room, keeps the answer for the ledger.

While there is at most one kernel per operation and device, the first that accepts wins. Where several do, the
measured fastest will (that needs the tuner's data).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.hardware.base import Gpu

TORCH = "torch"
CPU = "cpu_"  # what files of CPU kernels begin with


@dataclass(frozen=True)
class Choice:
    """The outcome for one operation. `kernel` None: the layer's own composition of torch operators, or of the
    kernels that the file `composed` of layers/ puts together. `losers`: name → reason."""

    op: str
    kernel: ModuleType | None
    why: str
    losers: dict[str, str]
    composed: str = ""

    @property
    def name(self) -> str:
        """The file's name of the kernel or of the composition, or "torch"."""
        return self.kernel.__name__.rpartition(".")[2] if self.kernel else self.composed or TORCH


def select(op: str, problem: Any, gpu: Gpu, wanted: str = "auto") -> Choice:
    """The kernel for `op` on `gpu`. `wanted` names one ("torch" for none); ConfigError if that one does not
    accept."""
    losers: dict[str, str] = {}
    accepted: list[tuple[str, ModuleType]] = []
    for name in names("kernels"):
        if name.startswith(CPU) != (gpu.kind == "cpu"):
            continue  # a CPU's start does not pay for importing Triton
        kernel = load("kernels", name)
        if getattr(kernel, "OP", None) != op:
            continue
        reason = kernel.accepts(problem, gpu)
        if reason is None:
            accepted.append((name, kernel))
        else:
            losers[name] = reason
    if wanted in losers:
        raise ConfigError(f"kernel {wanted} cannot run {op}: {losers[wanted]}")
    if wanted == TORCH:
        return Choice(op, None, "asked for", losers | {name: "torch was asked for" for name, _ in accepted})
    for name, kernel in accepted:
        if wanted in ("auto", name):
            return Choice(
                op,
                kernel,
                "accepts the problem" if wanted == "auto" else "asked for",
                losers | {TORCH: "slower"},
            )
    if wanted != "auto":
        there_are = ", ".join([*losers, *dict(accepted), TORCH])
        raise ConfigError(f"no kernel {wanted!r} for {op}", hint=f"there are: {there_are}")
    return Choice(op, None, "no kernel accepts", losers)
