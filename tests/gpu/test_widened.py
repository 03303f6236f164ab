"""Layers whose inner width no tile divides, on a real GPU: the cases that tests/cpu/layers/test_widened.py
runs under the interpreter."""

from __future__ import annotations

import pytest
import torch

from firebox.hardware.probe import probe_gpu
from tests.support.interpreted_widened import CASES, Layer

pytestmark = pytest.mark.gpu

# Roundings to bf16 of h and the output; with integers, of scales too. FP8 and 4-bit activations. All as in
# test_experts.py.
LIMITS = {"few": 4e-3, "sorted": 4e-3, "block-scaled": 0.06}
INTEGER_LIMIT, FP8_LIMIT, NVF4_LIMIT = 6e-3, 6e-2, 0.2


@pytest.mark.parametrize("case", CASES)
def test_a_layer_of_an_odd_width_computes_what_its_tensors_mean(case: str) -> None:
    gpu = probe_gpu()
    assert gpu is not None, "these tests need a GPU"
    layer = Layer(case, gpu, torch.device("cuda"))
    assert layer.made.problem.inter > layer.inter
    errors = {path: layer.error(path) for path in layer.paths}
    for path, error in errors.items():
        limit = INTEGER_LIMIT if "int4" in case else LIMITS[path]
        if path == "sorted" and "fp8" in case:
            limit = FP8_LIMIT
        if path == "block-scaled" and "nvfp4" in case:
            limit = NVF4_LIMIT
        assert error < limit, errors
