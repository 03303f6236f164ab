"""What a linear layer asks of a checkpoint where a GPU's kernels read weights as they are stored, where it
dequantises them for all that, and how many bytes the engine counts. No GPU is needed: nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.outline import facts
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, mxfp4, nvfp4
from firebox.formats.base import Format, PlainSlot, Slot, StoredSlot, WeightSlot
from firebox.hardware.base import Gpu, find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import _linear
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.layers.linear import DENSE, Linear
from firebox.weights.checkpoint import open_checkpoint
from tests.support.by_hand import awq_tensors, integer_quantise, modelopt_nvfp4
from tests.support.small_models import fp8_blocks, mxfp4_groups

CARDS = Path(__file__).parents[3] / "src/firebox/assets/cards"
CPU = torch.device("cpu")
COLUMNS = 256
PARTS = {"l.q": 256, "l.k": 128}
Tensors = dict[str, torch.Tensor]


def build(
    formats: Mapping[str, Format],
    gpu: Gpu | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shared: bool = True,
) -> Build:
    gpu = gpu or find_gpu("gb10")
    device = Device(gpu, CPU, 64) if shared else None
    return Build(gpu, CPU, dtype, dtype, 64, format_of=formats.__getitem__, shared=device)


def made(format: Format, **options: Any) -> Linear:
    return Linear(build(dict.fromkeys(PARTS, format)), COLUMNS, PARTS, **options)


def mxfp4_of(matrix: torch.Tensor) -> Tensors:
    blocks, scales = mxfp4_groups(matrix)
    return {"blocks": blocks, "scales": scales}


def fp8_tensor_of(matrix: torch.Tensor) -> Tensors:
    scale = matrix.abs().max() / 448
    return {"weight": (matrix / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


# the format, a writer, bytes of one weight with its scales
CASES: Mapping[str, tuple[Format, Callable[[torch.Tensor], Tensors], float]] = {
    "bf16": (bf16.Format(), lambda matrix: {"weight": matrix.bfloat16()}, 2),
    "fp8_channel": (fp8_channel.Format(), fp8_channel.quantise, 1 + 4 / COLUMNS),
    "fp8_block": (fp8_block.Format(), fp8_blocks, 1 + 4 / 128**2),
    "fp8_tensor": (fp8_tensor.Format(), fp8_tensor_of, 1),
    "nvfp4": (nvfp4.Format(), modelopt_nvfp4, 1 / 2 + 1 / 16),
    "mxfp4": (mxfp4.Format(), mxfp4_of, 1 / 2 + 1 / 32),
    "awq": (
        awq.Format(32),
        lambda matrix: awq_tensors(*integer_quantise(matrix, 32)),
        1 / 2 + (2 + 1 / 2) / 32,
    ),
}


def matrix(rows: int, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02


def fill(linear: Linear, stored: Mapping[str, Tensors]) -> None:
    """`stored`: path → what its format stores; the biases are the rows' numbers."""
    for slot in linear.slots():
        assert not hasattr(slot, "layouts")
        assert isinstance(slot, StoredSlot | WeightSlot | PlainSlot)
        if isinstance(slot, PlainSlot):
            slot.fill({slot.name: torch.arange(slot.target.shape[0]).float()})
        else:
            slot.fill({f"{slot.module}.{part}": tensor for part, tensor in stored[slot.module].items()})


def weight_slots(linear: Linear) -> list[Slot]:
    return [slot for slot in linear.slots() if not isinstance(slot, PlainSlot)]  # type: ignore[misc]


@pytest.mark.parametrize("name", CASES)
def test_a_weight_stays_as_it_is_stored(name: str) -> None:
    format, quantised, bytes_of = CASES[name]
    linear = made(format, bias=True)
    assert linear.refusal is None and linear.weight.is_meta
    slots = list(linear.slots())
    assert [type(slot) for slot in slots] == [StoredSlot, PlainSlot] * 2
    for slot, (path, rows) in zip(slots[::2], PARTS.items(), strict=True):
        assert isinstance(slot, StoredSlot) and slot.target.shape == (rows, COLUMNS) and slot.target.is_meta
        assert slot.tensors == {
            f"{path}.{part}": spec for part, spec in format.tensors(rows, COLUMNS).items()
        }
        per_weight = 4 if name in ("fp8_tensor", "nvfp4") else 0  # not the activations' optional scale
        assert slot.stored_bytes == rows * COLUMNS * bytes_of + per_weight
    stored = {path: quantised(matrix(rows)) for path, rows in PARTS.items()}
    fill(linear, stored)
    linear.finish()
    assert linear._kernels is not None
    problem, weights = linear._kernels.problem, linear._kernels.weights
    assert (problem.rows, problem.columns, problem.bias, problem.residual) == (384, COLUMNS, True, False)
    meant = torch.cat([format.dequantise(stored[path], rows, COLUMNS) for path, rows in PARTS.items()])
    limit = {"awq": 2.0**-7.99, "nvfp4": 1e-6}.get(name, 0.0)  # awq's scales become bf16
    torch.testing.assert_close(_linear.dequantised(problem, weights), meant.float(), rtol=limit, atol=0)
    assert weights.bias is not None
    assert torch.equal(weights.bias, torch.cat((torch.arange(256.0), torch.arange(128.0))).bfloat16().float())


def dequantises(linear: Linear, reason: str, stored: Mapping[str, Tensors], meant: torch.Tensor) -> None:
    assert linear.refusal is not None and reason in linear.refusal, linear.refusal
    assert {type(slot) for slot in weight_slots(linear)} == {WeightSlot}
    linear.weight.fill_(torch.nan)
    fill(linear, stored)
    linear.finish()
    assert linear._kernels is None and torch.equal(linear.weight, meant.to(linear.weight.dtype))
    x = torch.randn(3, linear.weight.shape[1], generator=torch.Generator().manual_seed(1)).to(
        linear.weight.dtype
    )
    assert torch.equal(linear(x, linear(x)), 2 * linear(x)), "the residual is added"


def stored_in(formats: Mapping[str, str], rows: Mapping[str, int], columns: int) -> tuple[
    dict[str, Tensors], torch.Tensor
]:  # fmt: skip
    """Each path's tensors, and what all of them mean below each other."""
    stored = {path: CASES[name][1](matrix(rows[path], columns)) for path, name in formats.items()}
    meant = [CASES[name][0].dequantise(stored[path], rows[path], columns) for path, name in formats.items()]
    return stored, torch.cat(meant).float()


def test_parts_in_different_formats_are_dequantised() -> None:
    formats = {"l.q": "fp8_channel", "l.k": "bf16"}
    linear = Linear(build({path: CASES[name][0] for path, name in formats.items()}), COLUMNS, PARTS)
    dequantises(linear, "the parts are in different formats", *stored_in(formats, PARTS, COLUMNS))


def test_groups_of_different_widths_are_different_formats() -> None:
    formats = {"l.q": awq.Format(32), "l.k": awq.Format(64)}
    assert Linear(build(formats), COLUMNS, PARTS).refusal == "the parts are in different formats"


@pytest.mark.parametrize("name", ["nvfp4", "bf16"])
def test_dense_asks_for_numbers_that_torch_computes_with(name: str) -> None:
    linear = made(CASES[name][0], dense=DENSE)
    stored = stored_in(dict.fromkeys(PARTS, name), PARTS, COLUMNS)
    dequantises(linear, "dequantised weights were asked for", *stored)


@pytest.mark.parametrize(
    ("name", "rows", "columns", "reason"),
    [
        ("bf16", 128, 40, "columns a multiple of 16 in bf16, not 40"),
        ("mxfp4", 128, 48, "columns a multiple of 32 in mxfp4, not 48"),
    ],
)
def test_sizes_that_no_kernel_reads(name: str, rows: int, columns: int, reason: str) -> None:
    linear = Linear(build({"l.o": CASES[name][0]}), columns, {"l.o": rows})
    assert linear.refusal is not None and reason in linear.refusal
    if name == "bf16":
        dequantises(linear, reason, *stored_in({"l.o": name}, {"l.o": rows}, columns))


def test_blocks_of_fp8_begin_with_a_part() -> None:
    """A last part may end within a block."""
    format = fp8_block.Format()
    three = {"l.a": 128, "l.b": 64, "l.c": 128}
    refused = Linear(build(dict.fromkeys(three, format)), COLUMNS, three)
    assert refused.refusal == "stacked parts are not whole blocks of 128 rows"
    assert Linear(build(dict.fromkeys(PARTS, format)), COLUMNS, {"l.q": 128, "l.k": 64}).refusal is None


def test_groups_that_the_kernels_do_not_know() -> None:
    linear = Linear(build({"l.o": gptq.Format(0)}), COLUMNS, {"l.o": 128})
    assert linear.refusal == f"knows no groups of {COLUMNS} columns in int4_zero"


def test_devices_and_dtypes_without_kernels() -> None:
    one = {"l.q": fp8_channel.Format(), "l.k": fp8_channel.Format()}
    on_a100 = Linear(build(one, find_gpu("a100")), COLUMNS, PARTS)
    assert on_a100.refusal == "has no FP8 type on a100"
    wide = Linear(build(one, dtype=torch.float32), COLUMNS, PARTS)
    assert wide.refusal == "kernels compute in bfloat16, not torch.float32"
    elsewhere = Linear(build(one, probe_cpu(), shared=False), COLUMNS, PARTS)
    assert elsewhere.refusal == "kernels of whole blocks pack dequantised weights"
    for linear in (on_a100, wide, elsewhere):
        assert {type(slot) for slot in weight_slots(linear)} == {WeightSlot} and not linear.weight.is_meta


def weights_bytes(card: str, gpu: Gpu, kind: str) -> int:
    model = ModelConfig(model=str(CARDS / card), dtype="bfloat16", load_format="dummy")
    config = Config(model=model, engine=EngineConfig(device=kind))
    return facts(open_checkpoint(CARDS / card), config, gpu).weights_bytes


def test_the_engine_counts_what_stays_in_memory() -> None:
    """gpt-oss-120b: 65,248,815,744 bytes of tensors by its index, and the experts' biases twice as wide; in
    bf16 two bytes for each of 116.83 · 10⁹ parameters."""
    biases = 36 * 128 * 3 * 2880
    assert weights_bytes("gpt-oss-120b", find_gpu("gb10"), "cuda") == 65_248_815_744 + 2 * biases
    assert weights_bytes("gpt-oss-120b", probe_cpu(), "cpu") == pytest.approx(2 * 116.83e9, rel=1e-3)
