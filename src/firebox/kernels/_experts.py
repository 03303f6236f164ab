"""What the kernels of an expert layer share: its sizes, its weights as they lie in memory, the arguments and
constants that follow from them, and the oracle. The device code is in kernels/_expert_tiles.py.

"_nibbles": the same format in the words that a block-scaled product reads too (kernels/_block_scaled.py);
int4_zero: integers with a zero point for each group (awq, gptq, asymmetric int4_group).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from firebox.formats.layouts import (
    ARRANGED,
    E2M1_BITS,
    INT4_BITS,
    from_panels,
    panel_columns,
    separate,
    unpack_words,
    unpack_zeros,
)
from firebox.hardware.base import Gpu
from firebox.kernels.launch import Launcher

FP8 = ("fp8_tensor", "fp8_channel", "fp8_block")
INT4_ZERO = "int4_zero"
INTEGERS = ("int4_group", INT4_ZERO)
MXFP4, NVFP4 = ("mxfp4", "mxfp4_nibbles"), ("nvfp4", "nvfp4_nibbles")
NIBBLES = ("mxfp4_nibbles", "nvfp4_nibbles")
FOUR_BIT = (*INTEGERS, *MXFP4, *NVFP4)
FORMATS = ("bf16", *FP8, *FOUR_BIT)
INT4_GROUPS = (32, 64, 128)
BLOCK = 128  # rows and columns of a block in fp8_block
WIDEST_STEP = 128  # columns of the least pipeline step of any format
KEPT_SHARE = 3  # of the L2, for what is to stay there
KEPT_BLOCK = 32  # choices of a block, up to which what sorted tokens leave is to stay there


@dataclass(frozen=True)
class Problem:
    """One expert layer on one GPU. `inter`: an expert's inner width, this GPU's share of it, `widened`
    where no tile divides that. `format`: of the experts' weights. `activation` and its numbers as in
    kernels/cpu_moe_block.py; `biases`: gpt-oss's. `dtype`: of hidden states, "bf16" or "f16". `residual`:
    the sum is added to what the output holds. `int4_columns`: that share a scale in 4-bit integers, one
    of INT4_GROUPS. `shared`: so many experts, the last ones, are every token's: the same to the kernels, but
    not to who measures them. `panels`: words and group scales lie in panels (formats/layouts.py). `normed`:
    hidden states are what a norm wrote, which writes FP8 codes where these are multiplied
    (layers/norm_gpu.py)."""

    hidden: int
    inter: int
    experts: int
    top_k: int
    format: str
    activation: str = "silu_mul"
    limit: float = 7.0
    alpha: float = 1.702
    biases: bool = False
    dtype: str = "bf16"
    residual: bool = False
    int4_columns: int = 32
    shared: int = 0
    panels: bool = False
    normed: bool = False

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where scales do not go by groups of columns of one row."""
        if self.format in INTEGERS:
            return self.int4_columns
        return {**dict.fromkeys(MXFP4, 32), **dict.fromkeys(NVFP4, 16)}.get(self.format, 0)

    @property
    def unit(self) -> int:
        """Columns whose 4-bit words hold codes a quarter of them apart (formats/layouts.py): a group's, or a
        panel's where a code is then a group's; 0 without words."""
        panels = {self.panel(self.hidden), self.panel(self.inter)}
        return 4 * self.group if self.format == "mxfp4" and panels == {4 * self.group} else self.group

    @property
    def arranged(self) -> bool:
        """Do activations of many tokens lie in another order? (layouts.arranged_columns)"""
        return 0 < self.unit < ARRANGED

    def panel(self, columns: int) -> int:
        """Columns of a panel of a matrix that has so many; 0 where rows lie as they are."""
        return panel_columns(columns, self.group) if self.panels else 0

    def stored(self, columns: int) -> int:
        """Columns that a matrix of so many is stored with: whole panels, the rest of the last one zeros."""
        panel = self.panel(columns)
        return -(-columns // panel) * panel if panel else columns


@dataclass(frozen=True)
class Weights:
    """The weights of one of the two matrices of all experts. `w` [experts, rows, columns] bf16 or
    float8_e4m3fn, or words [experts, rows, columns / 4] uint16. `scale`: of blocks [experts, rows / 128,
    columns / 128] float32 (gate blocks, then up blocks), or of groups [experts, rows, groups padded]: bf16
    (int4_group), int32 of scale and zero (int4_zero), uint8 E8M0 (mxfp4), float8_e4m3fn (nvfp4). In panels,
    words and scales of groups are [experts, panels, rows, those of a row in a panel], zeros behind the last.
    `row_scale` and `bias` [experts, rows] float32. Rows are interleaved where they are gate and up."""

    w: torch.Tensor
    scale: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None


WEIGHT_TYPES = {"bf16": "bf16", **dict.fromkeys(FP8, "fp8e4nv"), **dict.fromkeys(FOUR_BIT, "u16")}
GROUP_SCALE_TYPES = {
    "fp8_block": "fp32",
    "int4_group": "bf16",
    INT4_ZERO: "i32",
    **dict.fromkeys(MXFP4, "u8"),
    **dict.fromkeys(NVFP4, "fp8e4nv"),
}
ROW_SCALED = ("fp8_tensor", "fp8_channel", *NVFP4)
DTYPES = {"bf16": tl.bfloat16, "f16": tl.float16}
POINTER_NAMES = {"bf16": "bf16", "f16": "fp16"}


def operand(problem: Problem) -> str:
    """What weights are multiplied as where few tokens meet them: FP8 codes are exact in float16 too, and one
    instruction makes two of them."""
    return "f16" if problem.format in FP8 else problem.dtype


def weight_bytes(problem: Problem) -> float:
    """Bytes of one weight, its scales not counted."""
    return {"bf16": 2.0, **dict.fromkeys(FP8, 1.0)}.get(problem.format, 0.5)


def weight_arguments(
    problem: Problem, columns: int, rows: int, depth: int, *, tma: bool
) -> tuple[dict[str, str], dict[str, Any]]:
    """The arguments w, tiles, scale, row_scale and bias: those that are there with their Triton types, and
    the others as constants None. `columns`: of the matrix; `rows` and `depth`: of a tile."""
    kind = WEIGHT_TYPES[problem.format]
    together = min(depth, problem.panel(columns) or depth)
    present = {
        "w": f"*{kind}",
        "tiles": f"tensordesc<{kind}[{rows}, {together // 4 if problem.group else depth}]>" if tma else "",
        "scale": f"*{GROUP_SCALE_TYPES[problem.format]}" if problem.format in GROUP_SCALE_TYPES else "",
        "row_scale": "*fp32" if problem.format in ROW_SCALED else "",
        "bias": "*fp32" if problem.biases else "",
    }
    types = {name: type for name, type in present.items() if type}
    return types, dict.fromkeys(name for name, type in present.items() if not type)


def weight_constants(problem: Problem, columns: int, gpu: Gpu, *, interpreted: bool) -> dict[str, Any]:
    """The constants that every kernel here has. `columns`: of the matrix."""
    multiply, panel = operand(problem), problem.panel(columns)
    groups = columns // problem.group if problem.group else 0
    return {
        "HIDDEN": problem.hidden,
        "INTER": problem.inter,
        "GROUPS": problem.stored(columns) // problem.group if panel else -(-groups // 16) * 16,
        "STORED": problem.stored(columns),
        "PANEL": panel,
        "FORMAT": problem.format,
        "DTYPE": DTYPES[multiply],
        "GROUP": problem.group,
        "UNIT": problem.unit,
        "ASM": problem.group > 0 and multiply == "bf16" and not interpreted,
        "PDL": "pdl" in gpu.facts and not interpreted,
    }


def pipeline_depths(columns: int, problem: Problem, *, remainder: bool) -> tuple[int, ...]:
    """Columns of a pipeline step. `remainder`: what is left behind the last whole step may be a tile too.

    Only for few tokens: with a product of shared-memory operands behind the loop, Triton 3.6 reads past its
    shared memory on sm_90 (FP8, 320 columns in steps of 128; found by compute-sanitizer, 2026-11-21)."""
    # a quarter of a 4-bit step is an operand 16 columns wide
    least_depth = max(64, problem.group) if problem.group else 32
    depths = tuple(d for d in (32, 64, 128, 256, 512) if d >= least_depth)
    depths = (BLOCK,) if problem.format == "fp8_block" else depths
    least = max(32, min(64, 2 * problem.group), problem.group)
    columns = problem.stored(columns)
    fits = (lambda left: _power_of_2_or_0(left, least)) if remainder else (lambda left: left == 0)
    return tuple(d for d in depths if d <= columns and fits(columns % d))


def _power_of_2_or_0(left: int, least: int) -> bool:
    return left == 0 or (left >= least and left & (left - 1) == 0)


def refuse(problem: Problem) -> str | None:
    """Why no kernel of this family can run the problem on any GPU, or None."""
    if problem.format not in FORMATS:
        return f"knows no {problem.format} weights"
    if problem.format in INTEGERS and problem.group not in INT4_GROUPS:
        return f"knows groups of {', '.join(map(str, INT4_GROUPS))} columns, not {problem.group}"
    if problem.inter % 8 or problem.hidden % 16:
        return f"needs inter a multiple of 8 and hidden of 16, not {problem.inter} and {problem.hidden}"
    unit = BLOCK if problem.format == "fp8_block" else problem.group or 16
    if problem.inter % unit or problem.hidden % unit:
        return f"needs both widths a multiple of {unit} in {problem.format}"
    for width in (problem.hidden, problem.inter):
        if not pipeline_depths(width, problem, remainder=False):
            return f"has no tile for {width} columns in {problem.format}"
        if problem.group and width % ARRANGED:
            return f"reads activations by {ARRANGED} columns, which do not divide {width}"
    return None


def eviction(size: int, gpu: Gpu) -> str:
    """Triton's eviction policy for what a launch writes and the next one reads, `size` bytes: the last to go
    where that is at most a third of the L2, else none. The weights that stream by would push it out: TMA's
    loads have no policy, nor have Triton 3.6's other asynchronous ones, whatever the kernel says. H200, 16
    and 64 tokens: 0 to 4 % of a layer."""
    return "evict_last" if size <= gpu.l2_bytes // KEPT_SHARE else ""


def eviction_sorted(problem: Problem, block: int, row: int, gpu: Gpu) -> str:
    """`eviction` of a row of so many bytes for each choice, where every expert has a block; none for blocks
    of more than KEPT_BLOCK choices, which gain nothing (H200, 4,096 tokens: within 1 % either way)."""
    return eviction(block * problem.experts * row, gpu) if block <= KEPT_BLOCK else ""


def widened(problem: Problem) -> Problem:
    """The problem with the least inner width, no smaller than its own, that pipeline steps divide; itself
    where the format allows none.

    Tensor parallelism leaves widths such as 1,440 (MXFP4: 22.5 steps of 64) and 176 (FP8: 5.5 of 32). What is
    added are rows and columns of zeros, which `layers/_expert_store.py` writes when it is filled: an inner
    value of it is act(0, 0) = 0, and meets zeros in the second matrix, so results do not change. It costs 2 %
    (1,472) and 9 % (192) more bytes of experts. Masks within the pipelined loop would save these, but cost
    every step of every width; and a remainder behind the loop is what `pipeline_depths` warns of."""
    step = BLOCK if problem.format == "fp8_block" else max(problem.group, 16)
    least = -(-problem.inter // step) * step
    wide = (replace(problem, inter=inter) for inter in range(least, least + WIDEST_STEP, step))
    return next((found for found in wide if refuse(found) is None), problem)


def bound(launcher: Launcher, weights: Weights) -> dict[str, Any]:
    """The weights as the launch's arguments; a tensor descriptor is made where it wants one."""
    signature = launcher.request.signature
    found = {
        name: getattr(weights, name) for name in ("w", "scale", "row_scale", "bias") if name in signature
    }
    if "tiles" in signature:
        matrix = weights.w.flatten(0, -2)
        box = [int(size) for size in signature["tiles"].partition("[")[2].rstrip("]>").split(",")]
        found["tiles"] = TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), box)
    return found


def dequantised(problem: Problem, weights: Weights, expert: int, *, halves: bool) -> torch.Tensor:
    """One expert's matrix [rows, columns] in float32, as the formats mean it; `halves`: gate rows, then up
    rows. The kernels' oracle."""
    w, scale = weights.w[expert], None if weights.scale is None else weights.scale[expert]
    columns = problem.hidden if halves else problem.inter
    if w.dim() == 3 and scale is not None:
        w, scale = from_panels(w), from_panels(scale)[:, : columns // problem.group]
    if problem.format in FOUR_BIT:
        assert scale is not None
        codes = unpack_words(w, problem.unit, word_bits(problem.format))[:, :columns]
        values = codes.float() if problem.format in INTEGERS else e2m1(codes)
        factors, zeros = factors_and_zeros(problem.format, scale[:, : codes.shape[-1] // problem.group])
        matrix = ((values.unflatten(1, (-1, problem.group)) - zeros) * factors).flatten(1)
    else:
        matrix = w.float()
        if problem.format == "fp8_block":
            assert scale is not None
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            if halves:  # the scales are not interleaved, the rows are
                return torch.cat(separate(matrix)) * wide
            return matrix * wide
    if weights.row_scale is not None:
        matrix = matrix * weights.row_scale[expert].unsqueeze(-1)
    return torch.cat(separate(matrix)) if halves else matrix


def biases_of(weights: Weights, expert: int, *, halves: bool) -> torch.Tensor | float:
    """One expert's biases [rows], gate then up if `halves`; 0 without."""
    if weights.bias is None:
        return 0.0
    bias = weights.bias[expert].unsqueeze(-1)
    return (torch.cat(separate(bias)) if halves else bias).squeeze(-1)


def activated(problem: Problem, gate_up: torch.Tensor) -> torch.Tensor:
    """`gate_up` [rows, 2 · inter], gate first → [rows, inter], in float32."""
    gate, up = gate_up.chunk(2, dim=-1)
    if problem.activation == "silu_mul":
        return gate * gate.sigmoid() * up
    gate, up = gate.clamp(max=problem.limit), up.clamp(-problem.limit, problem.limit)
    return (up + 1) * gate * (gate * problem.alpha).sigmoid()


def word_bits(format: str) -> tuple[tuple[int, ...], ...]:
    """Where the bits of a word's four codes lie."""
    return E2M1_BITS if format in ("mxfp4", "nvfp4") else INT4_BITS


def factors_and_zeros(format: str, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [rows, groups, 1] in float32 from what is `stored` [rows, groups]."""
    if format == INT4_ZERO:
        scales, zeros = unpack_zeros(stored)
        return scales.unsqueeze(-1), zeros.unsqueeze(-1)
    factors = torch.exp2(stored.float() - 127) if format in MXFP4 else stored.float()
    return factors.unsqueeze(-1), torch.full_like(factors.unsqueeze(-1), 8 if format == "int4_group" else 0)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The values of codes 0 … 15 in float32."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    values = magnitudes[codes.long() & 7]
    return torch.where(codes >= 8, -values, values)
