"""MXFP4 and FP8 as transformers writes and reads them."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from firebox.formats import fp8_block, fp8_tensor, mxfp4
from firebox.formats.base import WeightSlot
from tests.support.quantise import fp8_dequantise, fp8_quantise


def test_every_mxfp4_code_with_every_scale_in_all_experts() -> None:
    """gpt-oss's blocks [experts, rows, groups, 16] and scales. Scale 255 is NaN by the OCP standard;
    transformers makes it 2^128, so it is left out here."""
    experts, rows, groups = 3, 85, 16
    blocks = (
        (torch.arange(experts * rows * groups * 16) % 256).to(torch.uint8).view(experts, rows, groups, 16)
    )
    scales = torch.arange(255, dtype=torch.uint8).view(experts, rows, 1).repeat(1, 1, groups)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # [experts, columns, rows]
    target = torch.empty(experts, rows, groups * 32)
    slot = WeightSlot("experts.down_proj", mxfp4.Format(), target, separator="_")
    slot.fill({"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales})
    assert torch.equal(target, expected.transpose(1, 2))
    assert len(target[target.isfinite()].unique()) > 1000


def test_mxfp4_scale_255_is_nan() -> None:
    scales = torch.tensor([[0, 1, 127, 254, 255]], dtype=torch.uint8)
    found = mxfp4.e8m0(scales)[0]
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127] and bool(found[4].isnan())
    blocks = torch.full((1, 1, 16), 0x10, dtype=torch.uint8)  # a zero code is NaN too under a NaN scale
    meaning = mxfp4.Format().dequantise({"blocks": blocks, "scales": scales[:, 4:]}, 1, 32)
    assert meaning.isnan().all()


@pytest.mark.parametrize("block", [(128, 128), (32, 64), (1, 16)])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_fp8_blocks_that_transformers_wrote(block: tuple[int, int], scale_fmt: str) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    weight[:128, :128] = 0  # a block of zeros
    tensors = fp8_quantise(weight, weight_block_size=block, scale_fmt=scale_fmt)
    format = fp8_block.Format(block)
    specs = format.tensors(256, 384)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    assert all(tensor.dtype in specs[name].dtypes for name, tensor in tensors.items())
    found = format.dequantise(tensors, 256, 384)
    assert torch.equal(found, fp8_dequantise(tensors))
    assert (found - weight).abs().mean() < 0.05


def test_fp8_for_the_whole_tensor_that_transformers_wrote() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    tensors = fp8_quantise(weight, weight_block_size=None)
    target = torch.empty(24, 40)
    slot = WeightSlot("x", fp8_tensor.Format("weight_scale_inv", "activation_scale"), target)
    slot.fill({f"x.{name}": tensor for name, tensor in tensors.items()})  # the scale is stored as [1, 1]
    assert torch.equal(target, fp8_dequantise(tensors))


def test_every_fp8_code_in_blocks() -> None:
    """All 256, NaN among them, under scales from 0 to the largest."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(32).view(32, 256)
    scales = torch.tensor([0.0, 1e-45, 1e-38, 448.0, 3e38, 1.0, 2.0**-127, -1.5]).view(2, 4)
    tensors = {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scales}
    found = fp8_block.Format((16, 64)).dequantise(tensors, 32, 256)
    expected = fp8_dequantise(tensors)
    assert torch.equal(found.isnan(), expected.isnan()) and int(found.isnan().sum()) == 64
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
