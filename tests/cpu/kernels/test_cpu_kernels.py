"""Every CPU kernel against its float64 reference on all its CASES, serial and parallel, float32 and bf16
weights."""

from __future__ import annotations

import copy

import pytest
import torch

from firebox.find import load, names
from firebox.kernels import cpu_race

CPU = [load("kernels", name) for name in names("kernels") if name.startswith("cpu_")]
KERNELS = [
    kernel for kernel in CPU if kernel is not cpu_race
]  # a draw has no rounding: its own tests are below
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


@pytest.mark.parametrize("case", cpu_race.CASES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_the_race_is_won_by_whom_the_formula_says(case, seed: int) -> None:
    made = cpu_race.inputs(case, seed)
    assert cpu_race.bind(case[0], {}, 1)(**made) == cpu_race.reference(case[0], made)


def test_the_race_is_won_as_often_as_the_softmax_says() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5, -3.0]])
    draws = 40_000
    found = torch.zeros(6)
    race = cpu_race.bind(cpu_race.Problem(6), {}, 1)
    for token in race(scores.expand(draws, -1).contiguous(), [11] * draws, list(range(draws))):
        found[token] += 1
    expected = scores[0].softmax(-1) * draws
    assert found[3] == 0
    possible = expected > 0
    chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 33.4, "exceeded once in a million with 4 degrees of freedom"


def test_rounding_of_the_scores_hardly_ever_changes_the_winner() -> None:
    """Another batch shape moves the logits by 1e-5; with inversion of the cumulative sum, one token in
    thousands would change."""
    generator = torch.Generator().manual_seed(3)
    rows = 4000
    scores = torch.randn(rows, 3072, generator=generator)
    noisy = scores + torch.randn(rows, 3072, generator=generator) * 1e-5
    race = cpu_race.bind(cpu_race.Problem(3072), {}, 1)
    pairs = zip(race(scores, [5] * rows, range(rows)), race(noisy, [5] * rows, range(rows)), strict=True)
    assert sum(a != b for a, b in pairs) <= 1
