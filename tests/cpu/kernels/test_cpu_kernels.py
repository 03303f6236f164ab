"""Every CPU kernel against its float64 reference on all its CASES, serial and parallel, float32 and bf16
weights."""

from __future__ import annotations

import copy

import pytest
import torch

from firebox.find import load, names

KERNELS = [load("kernels", name) for name in names("kernels") if name.startswith("cpu_")]
CASES = [
    pytest.param(kernel, case, id=f"{kernel.OP}-{number}")
    for kernel in KERNELS
    for number, case in enumerate(kernel.CASES)
]


def run(kernel, case, made, threads: int) -> torch.Tensor:
    """The kernel's output on private copies of the caches, with its packed weights."""
    made = copy.deepcopy(made)
    launch = kernel.bind(case[0], made["weights"], threads)
    extra = (made["step"], made["cache"]) if "step" in made else ()
    out = launch(made["x"], *extra)
    if "cache" in made:
        slots = made["step"].full.token_slots
        assert not made["cache"].k.flatten(0, 1)[slots].isnan().any(), "a key was not written"
    return out


def round_weights(made) -> None:
    """Makes every weight exact in bf16, so that the kernel packs it in 16 bits."""
    made["weights"] = {name: tensor.to(torch.bfloat16).float() for name, tensor in made["weights"].items()}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_kernel_equals_its_reference(kernel, case, threads: int, bf16: bool) -> None:
    made = kernel.inputs(case)
    if bf16:
        round_weights(made)
    expected = kernel.reference(case[0], copy.deepcopy(made))
    error = (run(kernel, case, made, threads) - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    assert error <= kernel.TOLERANCE, f"RMS error {error:.2e} of the reference's RMS"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.OP)
def test_every_weight_matters(kernel) -> None:
    """A tolerance that a kernel ignoring one of its weights could pass would be worthless."""
    case = kernel.CASES[1]  # more than one token, or the rotation and the softmax would be trivial
    made = kernel.inputs(case)
    expected = run(kernel, case, made, 1)
    for name, weight in made["weights"].items():
        if weight.numel() == 0:
            continue
        changed = copy.deepcopy(made)
        if name in ("cos", "sin"):  # position 0 alone would not see a rotation
            changed["weights"][name] = weight + 0.5
        else:
            changed["weights"][name] = weight.flip(0) * 1.5
        error = (run(kernel, case, changed, 1) - expected).pow(2).mean().sqrt() / expected.pow(
            2
        ).mean().sqrt()
        assert error > 100 * kernel.TOLERANCE, f"{name} does not reach the output"
