"""Layouts that are documents and not a library here: modelopt's NVFP4, AutoAWQ's and GPTQ's packed integers.
The oracles in tests/support/quantise.py go through them code by code."""

from __future__ import annotations

import itertools

import pytest
import torch

from firebox.formats import awq, gptq, int4_group, nvfp4
from firebox.formats._fp4 import E2M1
from tests.support.quantise import (
    awq_tensors,
    gptq_tensors,
    integer_meaning,
    integer_quantise,
    modelopt_nvfp4,
    modelopt_nvfp4_meaning,
    pack,
)


def test_the_4_bit_float() -> None:
    """OCP Microscaling Formats v1.0, E2M1: sign, two exponent bits of bias 1, one mantissa bit."""
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert float(E2M1[code]) == (-size if code & 8 else size)
    assert bool(E2M1[8].signbit())  # code 8 is −0


def test_modelopt_nvfp4() -> None:
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # a row whose scales modelopt keeps at its smallest
    tensors = modelopt_nvfp4(weight)
    found = nvfp4.Format().dequantise(tensors, 6, 80)
    assert torch.equal(found, modelopt_nvfp4_meaning(tensors))
    assert (found - weight).abs().mean() < 0.1


@pytest.mark.parametrize("scale_2", [1.0, 3.7e-5, 1e-40, 1e30])
def test_every_modelopt_nvfp4_code_with_every_scale(scale_2: float) -> None:
    scales = torch.arange(256, dtype=torch.uint8)
    tensors = {
        "weight": torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(8, 1),
        "weight_scale": scales.view(8, 32).view(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(scale_2),
    }
    found, expected = nvfp4.Format().dequantise(tensors, 8, 512), modelopt_nvfp4_meaning(tensors)
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 2 * 16
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(16, 64, 16), (8, 8, 8), (24, 384, 128), (32, 60, 20)]
)
def test_awq(rows: int, columns: int, group: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    quantised = integer_quantise(weight, group)
    tensors, format = awq_tensors(*quantised), awq.Format(group)
    specs = format.tensors(rows, columns)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    found = format.dequantise(tensors, rows, columns)
    assert torch.equal(found, integer_meaning(*quantised, torch.arange(columns) // group))
    assert (found - weight).abs().mean() < 0.1


def test_awq_s_first_word() -> None:
    """0x76543210 holds, from the lowest bits, rows 0, 2, 4, 6, 1, 3, 5, 7; zero point 0, scale 1."""
    tensors = {
        "qweight": torch.tensor([[0x76543210]], dtype=torch.int32),
        "qzeros": torch.tensor([[0]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    assert awq.Format(1).dequantise(tensors, 8, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_every_awq_code_and_zero_at_every_place() -> None:
    pairs = list(itertools.product(range(16), range(16)))  # zero, code
    codes = torch.tensor([[(code + row) % 16 for _, code in pairs] for row in range(16)])
    zeros = torch.tensor([[(zero + 3 * row) % 16 for zero in range(16)] for row in range(16)])
    scales = torch.linspace(0.01, 2, 256).view(16, 16).half().float()
    found = awq.Format(16).dequantise(awq_tensors(codes, zeros, scales), 16, 256)
    assert torch.equal(found, integer_meaning(codes, zeros, scales, torch.arange(256) // 16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [1, 0])
@pytest.mark.parametrize("order", ["grouped", "desc_act", "without g_idx", "one group"])
def test_gptq(bits: int, offset: int, order: str) -> None:
    rows, columns, group = 16, 96, 96 if order == "one group" else 32
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    group_of = torch.arange(columns) // group
    if order == "desc_act":
        group_of = group_of[torch.randperm(columns, generator=torch.Generator().manual_seed(2))]
    quantised = integer_quantise(weight, group, bits, group_of)
    tensors = gptq_tensors(*quantised, bits, group_of, offset)
    if order == "without g_idx":
        del tensors["g_idx"]
    format = gptq.Format(0 if order == "one group" else group, bits, offset, order == "desc_act")
    specs = format.tensors(rows, columns)
    assert all(tuple(tensor.shape) == specs[name].shape for name, tensor in tensors.items())
    found = format.dequantise(tensors, rows, columns)
    assert torch.equal(found, integer_meaning(*quantised, group_of))
    assert (found - weight).abs().mean() < 0.15


@pytest.mark.parametrize(("bits", "offset"), [(4, 1), (4, 0), (8, 1), (8, 0)])
def test_every_gptq_code_and_zero_at_every_place(bits: int, offset: int) -> None:
    """A stored zero of all ones means 16 (or 256) with "gptq": one more than a code can be."""
    count = 2**bits
    codes = torch.stack([(torch.arange(count) + row) % count for row in range(32)])
    zeros = torch.arange(count).repeat(32 * 32 // count).view(32, -1)[:, : count // 8] + offset
    scales = torch.linspace(0.01, 2, zeros.numel()).view(zeros.shape).half().float()
    group_of = torch.arange(count) // 8
    tensors = gptq_tensors(codes, zeros, scales, bits, group_of, offset)
    found = gptq.Format(8, bits, offset).dequantise(tensors, 32, count)
    assert torch.equal(found, integer_meaning(codes, zeros, scales, group_of))


def test_int4_columns_that_fill_neither_their_last_group_nor_their_last_word() -> None:
    """compressed-tensors refuses to write such groups; what they mean is no question."""
    rows, columns, group = 3, 45, 32
    codes = [[(r + 5 * c) % 16 for c in range(columns)] for r in range(rows)]
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25], [3.0, 1.5]])
    tensors = {
        "weight_packed": torch.tensor(
            [[pack(line[first : first + 8], 4) for first in range(0, columns, 8)] for line in codes],
            dtype=torch.int32,
        ),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    found = int4_group.Format(group).dequantise(tensors, rows, columns)
    expected = [
        [(codes[r][c] - 8) * float(scales[r, c // group]) for c in range(columns)] for r in range(rows)
    ]
    assert found.tolist() == expected
