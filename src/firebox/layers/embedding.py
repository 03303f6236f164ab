"""Token ids to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from firebox.formats.base import Cut, PlainSlot, Slots
from firebox.hardware.base import Gpu
from firebox.layers.base import Build
from firebox.layers.device import KERNEL_DTYPES, Device

if TYPE_CHECKING:
    from firebox.kernels import embed
    from firebox.kernels.plan import Operation, Setting

OP = "embedding"


class Embedding:
    """`weight` [vocab, hidden]. A gather is one launch of ours on an NVIDIA GPU, torch's elsewhere."""

    format = "bf16"

    def __init__(self, build: Build, name: str, vocab: int, hidden: int) -> None:
        self.name = name
        self.weight = build.empty(vocab, hidden)
        self._run: Callable[[torch.Tensor], torch.Tensor] = self._gather
        if build.shared is not None and self._refused(build.gpu) is None:
            self._run = self._with_kernel(build.shared)

    def slots(self) -> Slots:
        """The checkpoint's `{name}.weight`."""
        yield PlainSlot(f"{self.name}.weight", self.weight, cut=Cut(0, self.weight.shape[0], "vocab_size"))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids` [tokens] int64 → [tokens, hidden]."""
        return self._run(token_ids)

    def operations(self, setting: Setting) -> tuple[Operation, ...] | str:
        """What it launches on an NVIDIA GPU, for the plan; or why torch gathers there."""
        why = self._refused(setting.gpu)
        if why is not None:
            return why
        from firebox.kernels import embed
        from firebox.kernels.plan import Single

        return (Single("gather", self.format, embed, self._problem()),)

    def _gather(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.weight[token_ids]

    def _with_kernel(self, device: Device) -> Callable[[torch.Tensor], torch.Tensor]:
        from firebox.kernels import embed

        launcher = device.launcher(embed, self._problem())

        def run(token_ids: torch.Tensor) -> torch.Tensor:
            out = self.weight.new_empty(len(token_ids), self.weight.shape[1])
            embed.run(launcher, token_ids, self.weight, out)
            return out

        return run

    def _refused(self, gpu: Gpu) -> str | None:
        if self.weight.dtype not in KERNEL_DTYPES:
            return f"no kernel gathers rows of {self.weight.dtype}"
        from firebox.kernels import embed

        return embed.accepts(self._problem(), gpu)

    def _problem(self) -> embed.Problem:
        from firebox.kernels import embed

        return embed.Problem(self.weight.shape[1], KERNEL_DTYPES[self.weight.dtype])
