"""Weights that compressed-tensors wrote mean here what they mean there, and every code they can hold does."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme

from firebox.formats import fp8_block, fp8_channel, fp8_tensor, int4_group, mxfp4, nvfp4
from firebox.formats.base import Format
from tests.support.quantise import compress, compressed_scheme, decompress

FLOAT8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "scale_dtype": "torch.uint8"}

# layout, the library's arguments, our format, rows, columns
CASES: list[tuple[str, dict[str, object], Format, int, int]] = [
    ("float-quantized", {**FLOAT8, "strategy": "tensor"}, fp8_tensor.Format(), 7, 45),
    ("float-quantized", {**FLOAT8, "strategy": "channel"}, fp8_channel.Format(), 7, 45),
    *(
        (
            "float-quantized",
            {**FLOAT8, "strategy": "block", "block_structure": list(block)},
            fp8_block.Format(block, "weight_scale"),
            rows,
            columns,
        )
        for block, rows, columns in (
            ((128, 128), 256, 384),
            ((128, 128), 200, 300),
            ((128, 128), 1, 1),
            ((16, 32), 40, 72),
        )
    ),
    *(
        (
            "pack-quantized",
            {**INT4, "strategy": "group", "group_size": group},
            int4_group.Format(group),
            12,
            columns,
        )
        for group, columns in ((32, 32), (32, 160), (128, 128), (128, 512), (20, 60), (12, 36))
    ),
    *(
        (
            "pack-quantized",
            {**INT4, "strategy": "group", "group_size": group, "symmetric": False},
            int4_group.Format(group, symmetric=False),
            rows,
            columns,
        )
        for group, rows, columns in ((32, 16, 96), (128, 16, 256), (32, 13, 96), (12, 21, 36))
    ),
    ("pack-quantized", {**INT4, "strategy": "channel"}, int4_group.Format(0), 9, 43),
    (
        "pack-quantized",
        {**INT4, "strategy": "channel", "symmetric": False},
        int4_group.Format(0, False),
        9,
        43,
    ),
    ("nvfp4-pack-quantized", {**NVFP4, "group_size": 16}, nvfp4.Format("compressed_tensors"), 9, 80),
    ("mxfp4-pack-quantized", {**MXFP4, "group_size": 32}, mxfp4.Format("compressed_tensors"), 9, 160),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[3]}x{case[4]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_the_library_wrote(
    case: tuple[str, dict[str, object], Format, int, int], dtype: torch.dtype
) -> None:
    """`dtype`: of the model that was quantised, so of the scales."""
    layout, arguments, format, rows, columns = case
    scheme = compressed_scheme(**arguments)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = compress(layout, scheme, weight)
    specs = format.tensors(rows, columns)
    assert set(tensors) == {name for name, spec in specs.items() if not spec.optional}
    for name, tensor in tensors.items():
        assert tensor.dtype in specs[name].dtypes, name
        assert tuple(tensor.shape) == specs[name].shape or tensor.shape == (1,), name
    found = format.dequantise(tensors, rows, columns)
    assert torch.equal(found, decompress(layout, scheme, tensors))
    narrow = BaseCompressor.get_value_from_registry(layout).decompress(dict(tensors), scheme)["weight"]
    assert torch.allclose(found, narrow.float(), rtol=2**-6)  # as it is, it computes in 16 bits
    assert (found - weight.float()).abs().mean() < 0.15  # and it is the weight


def all_bytes(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] uint8: every byte, again and again."""
    return (torch.arange(rows * columns) % 256).to(torch.uint8).view(rows, columns)


@pytest.mark.parametrize(
    ("arguments", "format", "scale"),
    [
        ({"strategy": "tensor"}, fp8_tensor.Format(), torch.tensor([0.37])),
        ({"strategy": "channel"}, fp8_channel.Format(), torch.linspace(1e-3, 30, 16).view(16, 1)),
        ({"strategy": "channel"}, fp8_channel.Format(), torch.linspace(1e-38, 1e38, 16).view(16, 1)),
        (
            {"strategy": "block", "block_structure": [8, 8]},
            fp8_block.Format((8, 8), "weight_scale"),
            torch.linspace(-2, 2, 8).view(2, 4),
        ),
    ],
)
def test_every_fp8_code(arguments: dict[str, object], format: Format, scale: torch.Tensor) -> None:
    """All 256, the two NaN codes 0x7f and 0xff among them."""
    scheme = compressed_scheme(**FLOAT8, **arguments)
    tensors = {"weight": all_bytes(16, 32).view(torch.float8_e4m3fn), "weight_scale": scale}
    found = format.dequantise(tensors, 16, 32)
    expected = decompress("float-quantized", scheme, tensors)
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 4
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def awkward_rows() -> torch.Tensor:
    """[10, 256]: normal rows, one of zeros, one of a single number, tiny and huge ones, an outlier, numbers
    halfway between two codes and among the subnormal ones, and every code."""
    rows = torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    rows[1] = 0.0
    rows[2] = -3.7
    rows[3] *= 1e-30
    rows[4] *= 1e30
    rows[5, 7] = 1e6
    rows[6] = torch.cat((torch.tensor([448.0]), torch.arange(255) * 0.5 + 8.5))
    rows[7] = torch.cat((torch.tensor([-448.0]), torch.arange(255) * 2**-11))
    rows[8, :250] = 0.0
    rows[9] = all_bytes(1, 256).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_channel_quantises_as_the_library(dtype: torch.dtype) -> None:
    """Bit by bit, scales and codes, in float32 arithmetic; `dtype`: of the weight as it is stored."""
    weight = awkward_rows().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    expected = compress("float-quantized", compressed_scheme(**FLOAT8, strategy="channel"), weight.float())
    found = fp8_channel.quantise(weight)
    assert set(found) == set(expected)
    assert found["weight_scale"].dtype == torch.float32
    assert torch.equal(found["weight_scale"], expected["weight_scale"])
    assert torch.equal(found["weight"].view(torch.uint8), expected["weight"].view(torch.uint8))
    assert len(found["weight"].view(torch.uint8).unique()) == 254
    meant = fp8_channel.Format().dequantise(found, *weight.shape)
    again = fp8_channel.quantise(meant)
    assert torch.equal(again["weight"].view(torch.uint8), found["weight"].view(torch.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_int4_code_at_every_place(symmetric: bool) -> None:
    """Each of the 16 codes at each of a word's 8 places, with each of the 16 zero points."""
    scheme = compressed_scheme(**INT4, strategy="group", group_size=16, symmetric=symmetric)
    codes = torch.stack([(torch.arange(128) + r) % 16 - 8 for r in range(16)]).to(torch.int8)
    zeros = torch.stack([(torch.arange(8) + r) % 16 - 8 for r in range(16)]).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": torch.linspace(0.01, 3, 128).view(16, 8),
        "weight_shape": torch.tensor([16, 128]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0)
    found = int4_group.Format(16, symmetric).dequantise(tensors, 16, 128)
    assert torch.equal(found, decompress("pack-quantized", scheme, tensors))
    shift = 0 if symmetric else zeros.repeat_interleave(16, 1)
    assert torch.equal(found, (codes - shift).float() * tensors["weight_scale"].repeat_interleave(16, 1))


def fp4_case(
    format: Format, arguments: dict[str, object], scale: torch.Tensor, **extra: torch.Tensor
) -> None:
    group = int(str(arguments["group_size"]))
    rows, columns = scale.shape[0], scale.shape[1] * group
    tensors = {"weight_packed": all_bytes(rows, columns // 2), "weight_scale": scale, **extra}
    scheme: QuantizationScheme = compressed_scheme(**arguments)
    layout = f"{format.name}-pack-quantized"
    found = format.dequantise(tensors, rows, columns)
    assert torch.equal(found, decompress(layout, scheme, tensors))


@pytest.mark.parametrize("global_scale", [1.0, 0.001, 12345.678, 1e30])
def test_every_nvfp4_code_with_every_scale(global_scale: float) -> None:
    """Every pair of codes under every FP8 scale but NaN: 0, the subnormal ones, 448 and their negatives."""
    scales = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    scales = scales.view(torch.float8_e4m3fn).view(-1, 1).repeat(1, 32)
    format = nvfp4.Format("compressed_tensors")
    fp4_case(format, {**NVFP4, "group_size": 16}, scales, weight_global_scale=torch.tensor([global_scale]))


def test_every_mxfp4_code_with_every_scale() -> None:
    """Every pair of codes under every power of two: 0 is 2^−127, a subnormal number, and 254 is 2^127."""
    scales = torch.arange(255, dtype=torch.uint8).view(-1, 1).repeat(1, 16)
    fp4_case(mxfp4.Format("compressed_tensors"), {**MXFP4, "group_size": 32}, scales)
