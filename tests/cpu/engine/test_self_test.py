"""The self-test before the port opens: whole plans of small models under Triton's interpreter, sound and with
a kernel that computes something else."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from firebox.attention import triton_paged
from firebox.engine import self_test, trials
from firebox.engine._attempt import Result, Setup
from firebox.errors import LaunchRefused
from firebox.hardware.base import find_gpu
from firebox.kernels import _attention, _attention_choice, _linear, _tuned, _veto, attention_decode
from firebox.kernels._experts import Problem
from firebox.kernels.plan import Operation, Setting, planned
from firebox.layers import dense_gpu, expert_paths
from firebox.layers.launches import layers_of
from firebox.planning.fit import open_source
from firebox.text.folder import bundled
from tests.support.interpreter import interpreted
from tests.support.planning import source_of

GB10 = find_gpu("gb10")
SETUP = Setup(GB10, torch.device("cpu"), 8)
LINEAR = _linear.Problem(512, 256, "fp8_channel")
PASSED_BEFORE = "self-test: this plan has passed on this GPU before"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(tmp_path_factory.mktemp("self-test")))
        yield


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """What tuned files hold."""
    found: dict[str, dict[str, Any]] = {"experts": {}, "linear": {}, "attention": {}}
    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": found[name])
    _veto.lift()
    yield found
    monkeypatch.undo()
    _veto.lift()


@functools.cache
def ran(model: str, format: str, fault: str, *strict: str) -> Any:
    return interpreted("interpreted_self_test", model, format, fault, *strict)


@pytest.mark.parametrize(
    ("model", "format"), [("gpt_oss", "mxfp4"), ("glm4_moe", "fp8_block"), ("qwen3_5_moe", "bf16")]
)
def test_a_sound_plan_passes_every_launch_is_tried_and_it_is_remembered(model: str, format: str) -> None:
    found = ran(model, format, "none")
    assert found["untested"] == []
    assert all(error <= limit for _, _, error, limit in found["errors"])
    assert max(error for _, _, error, _ in found["errors"]) > 1e-5, "nothing was compared"
    assert {tokens for _, tokens, _, _ in found["errors"]} >= {1, 16, 17, 70}, "both ends of every range"
    assert found["tried"] > 8 and found["tried again"] == 0
    assert found["again"] == [PASSED_BEFORE]


def test_a_wrong_product_is_found_replaced_and_named() -> None:
    """Few tokens go another way; whatever else runs stays what it is."""
    found = ran("qwen3_moe", "bf16", "few")
    wrong = {launch.split()[0] for launch, _, error, limit in found["errors"] if error > limit}
    assert wrong == {"few"} and all(
        error == pytest.approx(0.1, abs=0.01)
        for launch, _, error, limit in found["errors"]
        if error > limit and "tokens=" not in launch  # not the experts' configuration
    )
    linears = [row for row in found["rows"] if row[0] in ("o", "head")]
    assert len({row[0] for row in linears}) == 2 and {row[4] for row in linears} == {"cublas"}
    said = "default; instead of few with Config(rows=64"
    assert all(row[5].startswith(said) and "off by 0.1 at " in row[5] for row in linears if row[2] == 1)
    kept = [row for row in found["rows"] if row[0] == "experts" and row[2] == 1]
    assert kept and all("instead" not in row[5] for row in kept)
    assert any(line.startswith("self-test: not few with") for line in found["lines"])
    assert "all within their limits" in found["lines"][-1]
    assert found["tried again"] > 0, "a plan with replacements is not remembered"


def test_strict_refuses_a_wrong_launch() -> None:
    found = ran("qwen3_moe", "bf16", "few", "strict")
    assert found["refused"].startswith("--strict: few with Config(rows=64")
    assert "failed its test at 1 tokens: off by 0.1, the limit is 0.005" in found["refused"]
    assert "lines" not in found


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("experts", ["no launch of bf16 hidden=256", "sorted with Config", "off by"]),
        ("norm", ["rms_norm's out failed its test at 1 tokens", "nothing else could run instead"]),
    ],
)
def test_what_nothing_can_replace_is_refused(fault: str, words: list[str]) -> None:
    found = ran("qwen3_moe", "bf16", fault)
    assert all(word in found["refused"] for word in words), found["refused"]


@pytest.mark.parametrize(
    ("fault", "wrong", "sound"),
    [("few", "few tokens, y", "few tokens, states"), ("chunks", "chunks, states", "chunks, y")],
)
def test_a_wrong_recurrence_is_found(fault: str, wrong: str, sound: str) -> None:
    """Of the requests with few tokens and of the others; nothing else could run instead."""
    found = ran("qwen3_5_moe", "bf16", f"delta of {fault}")
    errors = {launch: error for launch, _, error, _ in found["errors"]}
    assert errors[f"gated delta net of {wrong}"] == pytest.approx(0.1, abs=0.01)
    assert errors[f"gated delta net of {sound}"] < 2e-3
    assert f"gated delta net of {wrong} failed its test at " in found["refused"]
    assert "nothing else could run instead" in found["refused"]


def test_a_launch_that_raises_is_replaced_and_named() -> None:
    """By the real trials: what asks for too much shared memory is to blame, and another path runs."""
    found = ran("qwen3_moe", "bf16", "few raises")
    assert {launch.split()[0] for launch, _, error, _ in found["errors"] if error == math.inf} == {"few"}
    assert {row[4] for row in found["rows"]} == {"cublas"}
    said = "OutOfResources: out of resource: shared memory, Required: 147456, Hardware limit: 101376"
    assert any(line.startswith("self-test: not few with") and said in line for line in found["lines"])
    assert all(said in row[5] and " at 1 tokens" in row[5] for row in found["rows"] if row[2] == 1)


@pytest.mark.parametrize("gpu", ["h200", "gb10"])
@pytest.mark.parametrize("card", sorted(bundled()))
def test_there_is_a_trial_of_everything_that_a_card_launches(
    card: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--strict refuses a plan with kernels that no trial makes."""
    for name in ("LinearTrial", "ExpertsTrial", "AttentionTrial", "RopeDecodeTrial", "DeltaTrial"):
        monkeypatch.setattr(trials, name, lambda problem, setup: problem)  # real ones take real weights
    source = source_of(card, dtype="bfloat16")
    layers = layers_of(open_source(source, find_gpu(gpu)).model, Setting(find_gpu(gpu)))
    found = {operation for alike in layers for operation in alike.operations}
    assert len(found) > 8
    assert {o.name for o in found if trials.trial_of(o, SETUP) is None} == set()


# ---- launches that raise, played


class Raising:
    """Stands in for the trials of a product: paths raise what `raised` says of them; the paths tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **raised: Exception) -> None:
        self.raised, self.tried, self.have_raised = raised, list[str](), False
        monkeypatch.setattr(self_test, "trial_of", lambda operation, setup: self.trial)

    def trial(self, tokens: int) -> list[Result]:
        path = dense_gpu.path_of(LINEAR, tokens, GB10)
        choice = dense_gpu.choice_of(LINEAR, path)
        self.tried.append(path.name)
        with SETUP.launching(path.name, tokens, choice):
            self.have_raised = path.name in self.raised
            if self.have_raised:
                raise self.raised[path.name]
        return [Result(path.name, tokens, 0.0, 0.01, choice)]


def what_is_said(strict: bool = False) -> list[str]:
    """What the self-test of one product says."""
    operation = Operation("o", "fp8_channel", dense_gpu, LINEAR)
    return list(self_test.self_test(lambda: planned(operation, GB10, 8), SETUP, mode="on", strict=strict))


REFUSED = RuntimeError("Triton Error [CUDA]: invalid argument")


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(147_456, 101_376, "shared memory"),
        REFUSED,
        torch.AcceleratorError("CUDA error: misaligned address"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"),
    ],
)
def test_what_a_launch_raises_counts_as_its_failure(
    error: Exception, files: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Raising(monkeypatch, few=error)
    lines = what_is_said()
    words = f"few, {type(error).__name__}: {str(error).splitlines()[0]} at "
    assert any(line.startswith(f"self-test: not {words}") for line in lines)
    assert trials.tried[-1] == "many" and "all within their limits" in lines[-1]
    rows = planned(Operation("o", "fp8_channel", dense_gpu, LINEAR), GB10, 8)
    assert {row.path for row in rows} == {"many"}
    assert all(row.why.startswith(f"default; instead of {words}") for row in rows)


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("ours"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        KeyError("linear"),
    ],
)
def test_our_own_mistakes_are_no_kernels_failures(
    error: Exception, files: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Raising(monkeypatch, few=error)
    with pytest.raises(type(error)) as caught:
        what_is_said()
    assert caught.value is error and trials.tried == ["few"]
    assert dense_gpu.path_of(LINEAR, 8, GB10).name == "few", "nothing was vetoed"


@pytest.mark.parametrize(
    ("strict", "raised", "words"),
    [
        (True, {"few": REFUSED}, ["--strict: few failed its test at 1 tokens: RuntimeError: Triton Error"]),
        (
            False,
            {"few": REFUSED, "many": REFUSED},
            ["no launch of fp8_channel rows=512", "few, RuntimeError: Triton", "many, RuntimeError: Triton"],
        ),
    ],
)
def test_a_launch_that_raises_is_refused_under_strict_and_where_nothing_is_left(
    strict: bool, raised: dict[str, Exception], words: list[str], files: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    Raising(monkeypatch, **raised)
    with pytest.raises(LaunchRefused) as caught:
        what_is_said(strict=strict)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_without_a_device_no_candidate_is_tried(
    files: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access every call fails: also those that would give memory back."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    trials = Raising(monkeypatch, few=error)

    def fails(setup: Setup) -> None:
        if trials.have_raised:
            raise error

    monkeypatch.setattr(Setup, "_settle", fails)
    monkeypatch.setattr(Setup, "release", fails)
    with pytest.raises(
        LaunchRefused, match=r"few failed its test at 1 tokens: AcceleratorError: CUDA"
    ) as caught:
        what_is_said()
    assert "the GPU cannot be used any more, so nothing else was tried" in str(caught.value)
    assert trials.tried == ["few"]


# ---- vetoes


EXPERTS = Problem(256, 128, 8, 2, "bf16")
GQA = _attention.Problem(8, 2, 64, 64, 16)


def test_a_tuned_tile_gives_way_to_the_default_and_that_to_another_path(
    files: dict[str, dict[str, Any]],
) -> None:
    tile = {"rows": 32, "head": 0, "depth": 64, "slices": 1, "warps": 4, "stages": 3, "tma": False}
    files["linear"] = {dense_gpu.key(LINEAR): {1: {"path": "few", "config": tile}}}
    operation = Operation("o", "fp8_channel", dense_gpu, LINEAR)

    def now() -> tuple[str, str, str]:
        row = planned(operation, GB10, 8)[-1]
        return row.path, str(row.config.get("rows")), row.why

    only = ", weight-only: multiplied as f16"
    assert now() == ("few", "32", f"measured{only}")
    _veto.veto(dense_gpu.choice_of(LINEAR, dense_gpu.path_of(LINEAR, 8, GB10)), "the first")
    path, rows, why = now()
    assert (path, why) == ("few", f"default{only}; instead of the first") and rows != "32"
    for tokens in range(1, 9):
        while dense_gpu.path_of(LINEAR, tokens, GB10).name == "few":
            _veto.veto(dense_gpu.choice_of(LINEAR, dense_gpu.path_of(LINEAR, tokens, GB10)), "another")
    assert now()[::2] == ("many", "default; instead of the first")
    _veto.veto(dense_gpu.choice_of(LINEAR, dense_gpu.path_of(LINEAR, 8, GB10)), "the last")
    with pytest.raises(LaunchRefused, match=r"no launch of fp8_channel rows=512 .*first.*the last"):
        now()
    _veto.lift()
    assert now() == ("few", "32", f"measured{only}")


def test_experts_go_another_way_too(files: dict[str, dict[str, Any]]) -> None:
    first = expert_paths.path_of(EXPERTS, 4, GB10)
    assert first.name == "few"
    _veto.veto(expert_paths.choice_of(EXPERTS, first), "it")
    second = expert_paths.path_of(EXPERTS, 4, GB10)
    assert second.name == "sorted" and second.why.endswith("; instead of it")
    assert expert_paths.path_of(EXPERTS, 64, GB10).why == "default", "others are as they were"


def test_a_tuned_tile_of_attention_gives_way_to_the_default(files: dict[str, dict[str, Any]]) -> None:
    default = attention_decode.default(GQA, GB10, 1)
    tile = {"block_m": default.block_m, "block_n": 32, "num_warps": 8, "num_stages": 2}
    key = _attention_choice.key(_attention_choice.DECODE, GQA)
    files["attention"] = {key: {1: {"path": "decode", "config": tile}}}
    tuned = _attention_choice.decode_config(GQA, GB10, 1, 4)
    assert tuned != default and tuned.num_warps == 8
    _veto.veto(_attention_choice.choice_of(_attention_choice.DECODE, GQA, tuned), "it")
    assert _attention_choice.decode_config(GQA, GB10, 1, 4) == default
    (row, *_) = planned(Operation("attention", "bf16", triton_paged, GQA), GB10, 4)
    assert row.why == "default; instead of it"
