"""Every file of the formats room: what it stores, what that means, slots of two and three dimensions, and
where tensor parallelism may cut."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from firebox.find import load, names
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.base import Format, TensorSpec, WeightSlot

# format, rows, columns; sizes that fill the last word, group or block, and sizes that do not
CASES: list[tuple[Format, int, int]] = [
    (bf16.Format(), 24, 40),
    (bf16.Format(), 1, 1),
    (fp8_tensor.Format(), 24, 40),
    (fp8_tensor.Format("weight_scale_inv", "activation_scale"), 3, 5),
    (fp8_channel.Format(), 24, 40),
    (fp8_block.Format(), 256, 384),
    (fp8_block.Format((8, 16)), 24, 64),
    (fp8_block.Format((8, 16), "weight_scale"), 21, 49),
    (int4_group.Format(32), 16, 96),
    (int4_group.Format(128), 16, 256),
    (int4_group.Format(16, symmetric=False), 24, 64),
    (int4_group.Format(16, symmetric=False), 21, 53),
    (int4_group.Format(0), 5, 43),
    (int4_group.Format(0, symmetric=False), 5, 43),
    (mxfp4.Format(), 24, 96),
    (mxfp4.Format("compressed_tensors"), 24, 96),
    (nvfp4.Format(), 24, 64),
    (nvfp4.Format("compressed_tensors"), 24, 64),
    (nvfp4.Format("compressed_tensors"), 24, 40),
    (awq.Format(16), 24, 64),
    (awq.Format(32), 16, 80),
    (gptq.Format(16), 24, 64),
    (gptq.Format(0), 24, 64),
    (gptq.Format(16, bits=8), 24, 64),
    (gptq.Format(16, zero_offset=0), 24, 64),
]


def random_tensors(specs: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every bit of the codes is random; scales are near 1; a scalar is [1]."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in specs.items():
        shape, dtype = spec.shape or (1,), spec.dtypes[0]
        if dtype == torch.int32 and name == "g_idx":
            continue
        if dtype == torch.int32:
            made[name] = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
        elif dtype == torch.int64:
            made[name] = torch.zeros(shape, dtype=dtype)
        elif dtype == torch.uint8 and "scale" in name:
            made[name] = torch.randint(100, 150, shape, generator=generator).to(dtype)
        elif dtype in (torch.uint8, torch.float8_e4m3fn):
            codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
            codes[(codes & 127) == 127] = 0  # NaN equals nothing
            made[name] = codes.view(dtype)
        else:
            made[name] = torch.rand(shape, generator=generator) + 0.5
    return made


def test_every_file_has_a_case() -> None:
    files = set(names("formats")) - {"kv", "layouts", "select"}
    assert {format.name for format, _, _ in CASES} == files
    assert all(load("formats", name).Format().name == name for name in files)


@pytest.mark.parametrize(("format", "rows", "columns"), CASES, ids=str)
def test_it_means_a_float32_matrix_and_changes_nothing(format: Format, rows: int, columns: int) -> None:
    tensors = random_tensors(format.tensors(rows, columns))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    meaning = format.dequantise(tensors, rows, columns)
    assert meaning.dtype == torch.float32 and meaning.shape == (rows, columns)
    assert meaning.isfinite().all() and len(meaning.unique()) > rows * columns // 100
    assert all(
        torch.equal(tensors[name].view(torch.uint8), before[name].view(torch.uint8)) for name in tensors
    )


@pytest.mark.parametrize(("format", "rows", "columns"), CASES, ids=str)
def test_every_stored_tensor_takes_part(format: Format, rows: int, columns: int) -> None:
    """Except those that are not part of the weight: the activations' scale, the shape."""
    tensors = random_tensors(format.tensors(rows, columns))
    meaning = format.dequantise(tensors, rows, columns)
    others = random_tensors(format.tensors(rows, columns), seed=1)
    for name, spec in format.tensors(rows, columns).items():
        if name not in tensors:
            continue
        changed = not torch.equal(meaning, format.dequantise(tensors | {name: others[name]}, rows, columns))
        assert changed == (not spec.optional and name != "weight_shape"), name
        if spec.optional:
            rest = {key: tensor for key, tensor in tensors.items() if key != name}
            assert torch.equal(meaning, format.dequantise(rest, rows, columns))


@pytest.mark.parametrize(("format", "rows", "columns"), CASES, ids=str)
def test_a_slot_fills_its_target(format: Format, rows: int, columns: int) -> None:
    tensors = random_tensors(format.tensors(rows, columns))
    meaning = format.dequantise(tensors, rows, columns)
    for scalar in ((), (1,), (1, 1)):  # checkpoints store a scalar as any of these
        target = torch.full((rows, columns), torch.nan)
        slot = WeightSlot("a.b", format, target)
        assert list(slot.tensors) == [f"a.b.{name}" for name in format.tensors(rows, columns)]
        specs = format.tensors(rows, columns)
        slot.fill(
            {
                f"a.b.{name}": tensor.reshape(scalar) if specs[name].shape == () else tensor
                for name, tensor in tensors.items()
            }
        )
        assert torch.equal(target, meaning)


@pytest.mark.parametrize(("format", "rows", "columns"), CASES, ids=str)
def test_a_slot_of_all_experts_fills_each(format: Format, rows: int, columns: int) -> None:
    experts = [random_tensors(format.tensors(rows, columns), seed) for seed in range(3)]
    target = torch.full((3, columns, rows), torch.nan)
    slot = WeightSlot("e", format, target, separator="_", stored=(rows, columns), arrange=lambda w: w.T)
    stacked = {
        f"e_{name}": torch.stack([tensors[name] for tensors in experts]).reshape(
            slot.tensors[f"e_{name}"].shape
        )
        for name in experts[0]
    }
    slot.fill(stacked)
    for found, tensors in zip(target, experts, strict=True):
        assert torch.equal(found.T, format.dequantise(tensors, rows, columns))


@pytest.mark.parametrize(("format", "rows", "columns"), CASES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_cut_at_its_unit_it_means_the_same(format: Format, rows: int, columns: int, axis: int) -> None:
    """A part of each stored tensor, from where the part before it ends, means that part of the matrix."""
    whole = random_tensors(format.tensors(rows, columns))
    meaning = format.dequantise(whole, rows, columns)
    size, unit = (rows, columns)[axis], format.cut_unit(axis)
    for begin in range(0, size, unit):
        end = min(size, begin + unit)
        sizes = {n: (n, columns) if axis == 0 else (rows, n) for n in (begin, end, size)}
        before, until, whole_specs = (format.tensors(*sizes[n]) for n in (begin, end, size))
        part = {}
        for name, tensor in whole.items():
            for dim, full in enumerate(whole_specs[name].shape):
                start, stop = before[name].shape[dim], until[name].shape[dim]
                if start != full:  # else this dimension is not along the axis
                    tensor = tensor.narrow(dim, start, stop - start)
            part[name] = tensor
        expected = meaning.narrow(axis, begin, end - begin)
        cut = (end - begin, columns) if axis == 0 else (rows, end - begin)
        assert torch.equal(format.dequantise(part, *cut), expected), (begin, end)


def test_gptq_in_another_order_is_never_cut_along_columns() -> None:
    assert gptq.Format(desc_act=True).cut_unit(1) > 2**40
    assert gptq.Format(group=0).cut_unit(1) > 2**40
