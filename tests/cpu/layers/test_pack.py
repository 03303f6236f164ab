"""From checkpoint tensors to the kernels' weights: what the kernels' oracle makes of the packed ones is what
the format's own oracle makes of the stored ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from firebox.errors import UnsupportedFormat
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.base import Format
from firebox.hardware.base import find_gpu
from firebox.kernels import linear_few
from firebox.kernels._linear import dequantised
from firebox.layers._pack import pack, problem, stack
from tests.support import quantise

Tensors = dict[str, torch.Tensor]
ROWS, COLUMNS = 128, 384
# A float16 or float32 scale becomes bf16: 2⁻⁸ of the scale at most.
EXACT, BF16_SCALE = 1e-6, 2.0**-7.99


def weight(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)) * 0.02


def compressed(layout: str, **arguments: Any) -> Callable[[torch.Tensor], Tensors]:
    return lambda matrix: quantise.compress(layout, quantise.compressed_scheme(**arguments), matrix)


def int4(symmetric: bool, group: int) -> Callable[[torch.Tensor], Tensors]:
    return compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=group, symmetric=symmetric
    )


def awq_of(matrix: torch.Tensor) -> Tensors:
    return quantise.awq_tensors(*quantise.integer_quantise(matrix, 128))


def gptq_of(group: int, offset: int) -> Callable[[torch.Tensor], Tensors]:
    def made(matrix: torch.Tensor) -> Tensors:
        group_of = torch.arange(COLUMNS) // group
        return quantise.gptq_tensors(*quantise.integer_quantise(matrix, group), 4, group_of, offset)

    return made


def fp8_block_of(matrix: torch.Tensor) -> Tensors:
    """Rows that do not fill their last block have one all the same."""
    missing = -len(matrix) % 128
    padded = torch.cat((matrix, torch.zeros(missing, COLUMNS)))
    return _first_rows(quantise.fp8_quantise(padded, weight_block_size=(128, 128)), len(matrix))


def fp8_tensor_of(matrix: torch.Tensor) -> Tensors:
    scale = matrix.abs().max() / 448
    return {"weight": (matrix / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


FP4: dict[str, Any] = {"num_bits": 4, "type": "float"}
MXFP4 = compressed("mxfp4-pack-quantized", **FP4, strategy="group", group_size=32, scale_dtype="torch.uint8")
NVFP4 = compressed(
    "nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"
)
CASES: Mapping[str, tuple[Format, Callable[[torch.Tensor], Tensors], float]] = {
    "bf16": (bf16.Format(), lambda matrix: {"weight": matrix.bfloat16()}, 0),
    "fp8_tensor": (fp8_tensor.Format(), fp8_tensor_of, 0),
    "fp8_channel": (fp8_channel.Format(), fp8_channel.quantise, 0),
    "fp8_block": (fp8_block.Format(), fp8_block_of, 0),
    "int4 32": (int4_group.Format(32), int4(True, 32), BF16_SCALE),
    "int4 128": (int4_group.Format(128), int4(True, 128), BF16_SCALE),
    "int4 128 asymmetric": (int4_group.Format(128, False), int4(False, 128), BF16_SCALE),
    "awq": (awq.Format(128), awq_of, BF16_SCALE),
    "gptq": (gptq.Format(128), gptq_of(128, 1), BF16_SCALE),
    "gptq_v2 64": (gptq.Format(64, zero_offset=0), gptq_of(64, 0), BF16_SCALE),
    "mxfp4": (mxfp4.Format("compressed_tensors"), MXFP4, 0),
    "nvfp4 compressed": (nvfp4.Format("compressed_tensors"), NVFP4, EXACT),
    "nvfp4 modelopt": (nvfp4.Format(), quantise.modelopt_nvfp4, EXACT),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_weights_mean_what_the_format_means(name: str) -> None:
    format, quantised, limit = CASES[name]
    tensors = quantised(weight())
    wanted = format.dequantise(tensors, ROWS, COLUMNS)
    found = pack(format, tensors, ROWS, COLUMNS)
    meant = dequantised(problem(found), found.weights)
    # Relative to each number: a code in the wrong place is off by far more than a rounded scale.
    torch.testing.assert_close(meant, wanted, rtol=limit, atol=0)
    assert (wanted != 0).float().mean() > 0.5
    assert linear_few.accepts(problem(found), find_gpu("h200")) is None
    # kernels take rows as they lie: a matrix that was transposed on its way must not stay so
    assert all(part is None or part.is_contiguous() for part in vars(found.weights).values())


@pytest.mark.parametrize("name", CASES)
def test_stacked_parts_stand_below_each_other(name: str) -> None:
    """Each with scales of its own: the second part is 3 times as large."""
    format, quantised, _ = CASES[name]
    sizes = {ROWS: 1.0, 256: 3.0, 64: 1.0}
    parts = [pack(format, quantised(weight(rows) * by), rows, COLUMNS) for rows, by in sizes.items()]
    bias = torch.arange(448.0)
    found = stack(parts, bias.bfloat16())
    assert (found.rows, found.format, found.group) == (448, parts[0].format, parts[0].group)
    separately = torch.cat([dequantised(problem(part), part.weights) for part in parts])
    assert torch.equal(dequantised(problem(found), found.weights), separately)
    assert found.weights.bias is not None and torch.equal(found.weights.bias, bias.bfloat16().float())
    assert problem(found).bias and not problem(parts[0]).bias


def test_both_spellings_of_mxfp4() -> None:
    tensors = MXFP4(weight())
    theirs = {
        "blocks": tensors["weight_packed"].view(ROWS, -1, 16),
        "scales": tensors["weight_scale"],
    }
    both = [
        pack(mxfp4.Format(), theirs, ROWS, COLUMNS),
        pack(mxfp4.Format("compressed_tensors"), tensors, ROWS, COLUMNS),
    ]
    assert torch.equal(both[0].weights.w.view(torch.int16), both[1].weights.w.view(torch.int16))


def refused(format: Format, tensors: Tensors, words: str, rows: int = ROWS) -> None:
    with pytest.raises(UnsupportedFormat, match=words):
        pack(format, tensors, rows, COLUMNS)


def test_variants_that_the_kernels_do_not_know_are_refused() -> None:
    """And said, with what would do: never packed into numbers that mean something else."""
    good = gptq_of(128, 1)(weight())
    shuffled = good | {"g_idx": good["g_idx"].flip(0)}
    refused(gptq.Format(128), shuffled, "desc_act")
    refused(gptq.Format(128, bits=8), good, "8 bits")
    refused(gptq.Format(96), gptq_of(96, 1)(weight()), "groups of 96")
    refused(fp8_block.Format((64, 128)), fp8_block_of(weight()), "blocks of 64 × 128")
    tensors = MXFP4(weight())
    tensors["weight_scale"][3, 2] = 255  # NaN
    refused(mxfp4.Format("compressed_tensors"), tensors, "code 255")


def test_parts_that_do_not_fit_together_are_refused() -> None:
    one = pack(fp8_channel.Format(), fp8_channel.quantise(weight()), ROWS, COLUMNS)
    other = pack(bf16.Format(), {"weight": weight()}, ROWS, COLUMNS)
    with pytest.raises(UnsupportedFormat, match=r"different formats: bf16, group 0.*fp8_channel"):
        stack([one, other])
    narrow = pack(fp8_block.Format(), fp8_block_of(weight(256)), 256, COLUMNS)
    with pytest.raises(UnsupportedFormat, match="stacked parts of 64, 256 rows"):
        stack([pack(fp8_block.Format(), fp8_block_of(weight(64)), 64, COLUMNS), narrow])


def _first_rows(tensors: Tensors, rows: int) -> Tensors:
    return tensors | {"weight": tensors["weight"][:rows]}
