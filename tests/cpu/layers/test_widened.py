"""Widths that no tile divides, as tensor parallelism leaves them: kernels get the weights grown with zeros,
and compute what the checkpoint's own width means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firebox.formats import fp8_block, fp8_channel, int4_group, mxfp4, nvfp4
from firebox.formats.layouts import E2M1_BITS, unpack_words
from firebox.hardware.base import find_gpu
from firebox.kernels import _linear
from firebox.kernels._experts import FORMATS, NIBBLES, Problem, refuse, widened
from firebox.kernels.compile import compile_all
from firebox.layers._pack import Packed, pack, padded
from firebox.layers.expert_paths import path_of, requests
from tests.support import quantise
from tests.support.interpreted_widened import int4_of, mxfp4_of
from tests.support.small_models import fp8_blocks

ROOT = Path(__file__).resolve().parents[3]
# Roundings of h and the output to float16; with integers, of scales to bf16. Where activations are rounded
# too, to 8 bits or 4, the interpreter truncates: twice what tests/gpu allows.
LIMIT, INTEGER_LIMIT = 1e-3, 6e-3
ROUNDED = {
    ("fp8_channel", "sorted"): 0.12,
    ("dense fp8_channel", "many"): 0.12,
    ("nvfp4 nibbles", "block-scaled"): 0.25,
    ("mxfp4 nibbles", "block-scaled"): 0.12,
}
OSS = Problem(2880, 1440, 128, 4, "mxfp4", "clamped_swiglu", biases=True)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[int, int, dict[str, float]]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_widened"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, int, dict[str, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_layers_of_odd_widths_compute_what_their_tensors_mean(
    interpreted: dict[str, tuple[int, int, dict[str, float]]],
) -> None:
    """Every path of every format, filled through the layer's slots into memory full of NaN."""
    widths = {case: (own, kept) for case, (own, kept, _) in interpreted.items()}
    assert widths == {
        "bf16": (52, 64), "fp8_channel": (176, 192), "int4_group": (96, 128),
        "nvfp4 nibbles": (48, 64), "mxfp4": (96, 128), "mxfp4 nibbles": (96, 128),
        "dense fp8_channel": (40, 48),
    }  # fmt: skip
    for case, (_, _, errors) in interpreted.items():
        assert len(errors) == (3 if "nibbles" in case else 2)
        for path, error in errors.items():
            limit = ROUNDED.get((case, path), INTEGER_LIMIT if case == "int4_group" else LIMIT)
            assert error < limit, (case, path, error)


@pytest.mark.parametrize("format", FORMATS)
def test_the_least_width_that_works(format: str) -> None:
    """Every width up to 3,000 becomes one that no narrower one could stand for."""
    unit = {"fp8_block": 128, "bf16": 16}.get(format, Problem(128, 128, 1, 1, format).group or 16)
    for inter in range(unit, 3000, unit):
        p = Problem(4096, inter, 8, 2, format)
        wide = widened(p)
        assert refuse(wide) is None and wide.inter >= inter
        assert all(refuse(Problem(4096, n, 8, 2, format)) for n in range(inter, wide.inter, unit))
    assert widened(Problem(4096, 384, 8, 2, format)).inter == 384
    nothing = Problem(4100, 384, 8, 2, format)
    assert widened(nothing) == nothing, "no inner width helps where the outer one has no tile"


def test_what_tensor_parallelism_leaves_of_the_cards() -> None:
    assert widened(OSS).inter == 1472
    panels = replace(OSS, panels=True)
    assert widened(panels).inter == 1472, "activations lie in runs of 64, panels or not"
    assert widened(Problem(4096, 176, 129, 9, "fp8_channel")).inter == 192


@pytest.mark.parametrize("name", ["fp8_channel", "fp8_block", "int4_group", "nvfp4"])
def test_a_grown_matrix_is_the_same_with_zeros_behind(name: str) -> None:
    made = {
        "fp8_channel": (fp8_channel.Format(), fp8_channel.quantise, (176, 192), (185, 208)),
        "fp8_block": (fp8_block.Format(), fp8_blocks, (256, 128), (384, 256)),
        "int4_group": (int4_group.Format(32), int4_of, (72, 96), (88, 640)),
        "nvfp4": (nvfp4.Format(), quantise.modelopt_nvfp4, (72, 48), (80, 320)),
    }
    format, quantised, (rows, columns), (more_rows, more_columns) = made[name]
    torch.manual_seed(0)
    packed = pack(format, quantised(torch.randn(rows, columns)), rows, columns)
    grown = padded(packed, more_rows, more_columns)
    found, own = dequantised(grown), dequantised(packed)
    assert found.shape == (more_rows, more_columns) and torch.equal(found[:rows, :columns], own)
    assert not found[rows:].any() and not found[:, columns:].any() and own.any()
    assert padded(packed, rows, columns) is packed


def test_words_in_units_grow_by_whole_units() -> None:
    """1,440 columns are 11.25 units of 128, 1,472 are 11.5: as many words, the same ones."""
    tensors = mxfp4_of(torch.randn(16, 1440, generator=torch.Generator().manual_seed(0)))
    packed = pack(mxfp4.Format(), tensors, 16, 1440, unit=128)
    grown = padded(packed, 24, 1472)
    assert grown.weights.w.shape == (24, 384) and grown.unit == 128 and grown.columns == 1472
    assert torch.equal(grown.weights.w[:16].view(torch.int16), packed.weights.w.view(torch.int16))
    codes = unpack_words(grown.weights.w, 128, E2M1_BITS)
    by_groups = unpack_words(pack(mxfp4.Format(), tensors, 16, 1440).weights.w, 32, E2M1_BITS)
    assert torch.equal(codes[:16, :1440], by_groups) and not codes[:, 1440:].any() and not codes[16:].any()


def dequantised(packed: Packed) -> torch.Tensor:
    problem = _linear.Problem(packed.rows, packed.columns, packed.format, packed.group)
    return _linear.dequantised(problem, packed.weights)


GPT_OSS, AIR = "gpt-oss at tp 2", "GLM-4.5-Air at tp 8"


@pytest.mark.parametrize(
    ("gpu_name", "tokens", "instructions"),
    [
        ("gb10", {GPT_OSS: (4, 500, 8192), AIR: (500,)}, {"mma.bf16", "mma.mxf8", "mma.fp8"}),
        ("rtx-5090", {GPT_OSS: (8192,), AIR: (500,)}, {"mma.mxf8", "mma.fp8"}),
        ("h200", {GPT_OSS: (500,), AIR: (500,)}, {"wgmma.bf16", "wgmma.fp8"}),
    ],
)
def test_launches_of_grown_widths_fit_and_are_native(
    gpu_name: str, tokens: dict[str, tuple[int, ...]], instructions: set[str]
) -> None:
    gpu = find_gpu(gpu_name)
    nibbles = "mma.mxf8" in gpu.facts
    problems = {
        GPT_OSS: widened(replace(OSS, format=NIBBLES[0] if nibbles else "mxfp4")),
        AIR: widened(Problem(4096, 176, 129, 9, "fp8_channel")),
    }
    wanted = {
        (name, n, op): request
        for name, numbers in tokens.items()
        for n in numbers
        for op, request in requests(problems[name], n, path_of(problems[name], n, gpu), gpu).items()
        if op in ("moe_gate_up", "moe_down")
    }
    found = dict(zip(wanted, compile_all(list(wanted.values())), strict=True))
    for name, compiled in found.items():
        assert compiled.fits and compiled.native, (name, compiled)
        assert compiled.spill_bytes == 0, (name, compiled.spill_bytes)
    assert {compiled.instruction for compiled in found.values()} == instructions
    assert max(compiled.shared_bytes for compiled in found.values()) <= gpu.smem_per_block_bytes
