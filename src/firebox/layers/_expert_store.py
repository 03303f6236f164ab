"""The weights of a layer's routed experts in the layout of the GPU kernels (formats/layouts.py), filled
matrix by matrix as the checkpoint's tensors come."""

from __future__ import annotations

import torch

from firebox.formats import layouts
from firebox.kernels._experts import BLOCK, GROUP_SCALE_TYPES, ROW_SCALED, WEIGHT_TYPES, Problem, Weights
from firebox.layers._invented import invented
from firebox.layers._pack import Packed

TYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8e4nv": torch.float8_e4m3fn,
    "u16": torch.uint16,
    "fp32": torch.float32,
    "u8": torch.uint8,
    "i32": torch.int32,
}
RUN = layouts.RUN


class ExpertStore:
    """`gate_up` and `down` of all experts; uninitialised but for the biases, which are zero."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self._device = problem, device
        self.gate_up = self._empty(2 * problem.inter, problem.hidden)
        self.down = self._empty(problem.hidden, problem.inter)

    def _empty(self, rows: int, columns: int) -> Weights:
        p, experts, panel = self.problem, self.problem.experts, self.problem.panel(columns)
        shape = (experts, -(-columns // panel), rows) if panel else (experts, rows)
        width = (panel or columns) // layouts.PER_WORD if p.group else columns
        kind = WEIGHT_TYPES[p.format] if p.format != "bf16" else p.dtype
        w = self._zeros(kind, *shape, width)
        scale = row_scale = None
        if panel:
            scale = self._zeros(GROUP_SCALE_TYPES[p.format], *shape, panel // p.group)
        elif p.format in GROUP_SCALE_TYPES:
            per_row = -(-columns // p.group // 16) * 16 if p.group else columns // BLOCK
            height = rows if p.group else rows // BLOCK
            scale = self._zeros(GROUP_SCALE_TYPES[p.format], experts, height, per_row)
        if p.format in ROW_SCALED:
            row_scale = self._zeros("fp32", experts, rows)
        return Weights(w, scale, row_scale, self._zeros("fp32", experts, rows) if p.biases else None)

    def _zeros(self, kind: str, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=TYPES[kind], device=self._device)

    def _check(self, packed: Packed) -> None:
        unit = packed.unit or packed.group
        assert unit == self.problem.unit, f"words in units of {unit} columns, not {self.problem.unit}"

    def keep_half(self, expert: int, half: int, packed: Packed) -> None:
        """An expert's gate (0) or up (1) matrix [inter, hidden]."""
        self._check(packed)
        to, blocks = self.gate_up, self.problem.inter // BLOCK
        for name in ("w", "scale", "row_scale"):
            target, source = getattr(to, name), getattr(packed.weights, name)
            if target is None:
                continue
            if name == "scale" and not self.problem.group:  # gate blocks, then up blocks
                _copy(target[expert, half * blocks : (half + 1) * blocks], source)
                continue
            kept = _bytes(target[expert])
            runs = kept.unflatten(-2, (-1, 2, RUN))[..., half, :, :]
            runs.copy_(_laid_as(kept, source).unflatten(-2, (-1, RUN)))

    def keep_down(self, expert: int, packed: Packed) -> None:
        """An expert's down matrix [hidden, inter]."""
        self._check(packed)
        for name in ("w", "scale", "row_scale"):
            if getattr(self.down, name) is not None:
                _copy(getattr(self.down, name)[expert], getattr(packed.weights, name))

    def invent(self, generator: torch.Generator) -> None:
        """All of both, made up."""
        p = self.problem
        for to, columns in ((self.gate_up, p.hidden), (self.down, p.inter)):
            for expert in range(p.experts):
                rows = to.w.shape[-2]
                made = invented(p.format, p.group, (rows,), columns, generator, TYPES[p.dtype], p.unit)
                for name, source in zip(("w", "scale", "row_scale"), made, strict=True):
                    if source is not None:
                        _copy(getattr(to, name)[expert], source)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[rows] or [..., rows, n] as rows of bytes, which every device can copy."""
    return (tensor.unsqueeze(-1) if tensor.dim() == 1 else tensor).contiguous().view(torch.uint8)


def _laid_as(kept: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The bytes of `source` [rows] or [rows, n] as those of `kept` lie: [rows, bytes], or in panels, which
    pad groups in their own way."""
    rows = _bytes(source)
    if kept.dim() == 2:
        return rows
    panels, _, width = kept.shape
    return layouts.to_panels(rows[:, : panels * width], width)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    kept = _bytes(target)
    kept.copy_(_laid_as(kept, source))
