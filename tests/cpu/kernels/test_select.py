"""Who runs an operation, and why: invented kernels for every outcome, then the real room."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch

from firebox.errors import ConfigError
from firebox.find import load, names
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import cpu_moe_block
from firebox.kernels import select as module
from firebox.kernels.select import select

CPU = probe_cpu()
GPU = Gpu("gb10", "cuda", 0, 0, 0, frozenset())


def kernel(name: str, op: str | None, reason: str | None) -> ModuleType:
    """A module in the kernels' room that answers `reason`."""
    made = ModuleType(f"firebox.kernels.{name}")
    if op is not None:
        made.OP = op  # type: ignore[attr-defined]
    made.accepts = lambda problem, gpu: reason and f"{reason} {problem} on {gpu.name}"  # type: ignore[attr-defined]
    return made


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Three kernels of one operation, one of another, and a file that is no kernel."""
    made = {
        "cpu_alpha": kernel("cpu_alpha", "norm", "is too slow for"),
        "cpu_beta": kernel("cpu_beta", "norm", None),
        "cpu_gamma": kernel("cpu_gamma", "norm", "does not know"),
        "cpu_other": kernel("cpu_other", "head", None),
        "cpu_plan": kernel("cpu_plan", None, None),
    }
    monkeypatch.setattr(module, "names", lambda room_name: tuple(made))
    monkeypatch.setattr(module, "load", lambda room_name, name: made[name])
    return made


def test_the_one_that_accepts_wins_and_the_losers_say_why(room: dict[str, ModuleType]) -> None:
    choice = select("norm", 64, CPU)
    assert (choice.op, choice.name, choice.kernel) == ("norm", "cpu_beta", room["cpu_beta"])
    assert choice.why == "accepts the problem"
    assert choice.losers == {
        "cpu_alpha": "is too slow for 64 on cpu",
        "cpu_gamma": "does not know 64 on cpu",
        "torch": "slower",
    }


def test_nobody_accepts(room: dict[str, ModuleType]) -> None:
    del room["cpu_beta"]
    choice = select("norm", 64, CPU)
    assert (choice.name, choice.kernel, choice.why) == ("torch", None, "no kernel accepts")
    assert set(choice.losers) == {"cpu_alpha", "cpu_gamma"}


def test_no_kernel_for_the_operation_at_all(room: dict[str, ModuleType]) -> None:
    choice = select("rope", 64, CPU)
    assert (choice.name, choice.why, choice.losers) == ("torch", "no kernel accepts", {})


def test_by_name(room: dict[str, ModuleType]) -> None:
    choice = select("norm", 64, CPU, "cpu_beta")
    assert (choice.kernel, choice.why) == (room["cpu_beta"], "asked for")
    assert set(choice.losers) == {"cpu_alpha", "cpu_gamma", "torch"}


def test_the_second_that_accepts_by_name(room: dict[str, ModuleType]) -> None:
    room["cpu_delta"] = kernel("cpu_delta", "norm", None)
    assert select("norm", 64, CPU).name == "cpu_beta"
    assert select("norm", 64, CPU, "cpu_delta").kernel is room["cpu_delta"]


def test_torch_by_name_is_no_fallback_but_a_wish(room: dict[str, ModuleType]) -> None:
    choice = select("norm", 64, CPU, "torch")
    assert (choice.name, choice.kernel, choice.why) == ("torch", None, "asked for")
    assert choice.losers["cpu_beta"] == "torch was asked for" and choice.losers["cpu_alpha"].startswith(
        "is too slow"
    )


def test_wanted_but_does_not_accept(room: dict[str, ModuleType]) -> None:
    with pytest.raises(ConfigError, match="kernel cpu_gamma cannot run norm: does not know 64 on cpu"):
        select("norm", 64, CPU, "cpu_gamma")


@pytest.mark.parametrize("wanted", ["nonsense", "cpu_other", "cpu_plan", ""])
def test_wanted_but_unknown_names_every_one_there_is(room: dict[str, ModuleType], wanted: str) -> None:
    """A kernel of another operation is as unknown as one that does not exist."""
    with pytest.raises(ConfigError, match=f"no kernel '{wanted}' for norm") as caught:
        select("norm", 64, CPU, wanted)
    listed = str(caught.value.hint).partition(": ")[2].split(", ")
    assert sorted(listed) == ["cpu_alpha", "cpu_beta", "cpu_gamma", "torch"]


# ---- the real room

CPU_KERNELS = {name: load("kernels", name) for name in names("kernels") if name.startswith("cpu_")}
OPS = sorted({found.OP for found in CPU_KERNELS.values()})


def problem_of(op: str) -> tuple[str, object]:
    """A kernel of `op` and the first problem it is tested on."""
    for name, found in CPU_KERNELS.items():
        if op == found.OP:
            return name, found.CASES[0][0]
    raise AssertionError(op)


@pytest.mark.parametrize("op", OPS)
def test_every_operation_runs_its_kernel_in_float32_on_a_cpu(op: str) -> None:
    name, problem = problem_of(op)
    assert select(op, problem, CPU).name == name


@pytest.mark.parametrize("op", OPS)
def test_every_operation_falls_back_where_the_cpu_kernels_cannot_go(op: str) -> None:
    name, problem = problem_of(op)
    if op != "race":  # which draws from float32 scores whatever the model computes in
        narrow = select(op, dataclasses.replace(problem, dtype=torch.bfloat16), CPU)
        assert narrow.kernel is None and "bfloat16" in narrow.losers[name]
    assert CPU_KERNELS[name].accepts(problem, GPU) == "is made for a CPU"
    assert name not in select(op, problem, GPU).losers  # it was not even asked


def test_a_gpu_does_not_ask_cpu_kernels_nor_a_cpu_the_others(room: dict[str, ModuleType]) -> None:
    room["delta"] = kernel("delta", "norm", None)
    assert select("norm", 64, GPU).name == "delta"
    assert "delta" not in select("norm", 64, CPU).losers


def test_group_limited_routing_is_refused_with_its_number_of_groups() -> None:
    problem = dataclasses.replace(cpu_moe_block.CASES[0][0], expert_groups=4)
    assert "4" in select("moe_block", problem, CPU).losers["cpu_moe_block"]
    with pytest.raises(ConfigError, match=r"cpu_moe_block cannot run moe_block: .*groups"):
        select("moe_block", problem, CPU, "cpu_moe_block")
