"""The start of an engine on a GPU: gpt-oss-120b, two layers of random weights. The plan is compiled and
tested before weights are there, the ledger has every launch, memory is what was planned, and a test that was
passed is not repeated.

Run with -rP to read times and memory. Needs the engine's packages.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from firebox.cli._explanation import explanation
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine import start as engine_start
from firebox.engine._attempt import Setup
from firebox.engine._delta_trial import DeltaTrial
from firebox.engine.messages import Ready, SamplingParams
from firebox.engine.request import Request
from firebox.errors import LaunchRefused, OutOfMemory
from firebox.hardware.probe import probe_gpu
from firebox.kernels import _veto, launch, linear_few
from firebox.kernels._gated_delta import Problem
from firebox.kernels.compile import CompileRequest
from firebox.text.folder import bundled
from tests.support.gated_delta import QWEN, QWEN_TP4

pytestmark = [pytest.mark.gpu, pytest.mark.alone]  # what is free is held against what was planned
ENGINE = EngineConfig(device="cuda", context_length=4096)
MIB = 2**20


@dataclasses.dataclass
class Started:
    """`order`: what came before the engine was ready; `launched`: the compiles that were launched since."""

    scheduler: Any
    runner: Any
    ready: Ready
    order: list[str]
    launched: list[CompileRequest]
    seconds: float


def started(**changes: Any) -> Started:
    """The engine, after prompts and decode steps of many sizes."""
    model = ModelConfig(model=str(bundled()["gpt-oss-120b"]), load_format="dummy", layers=2)
    config = Config(model=model, engine=dataclasses.replace(ENGINE, **changes))
    order: list[str] = []

    def noted(name: str) -> Any:
        function = getattr(engine_start, name)
        return lambda *arguments, **named: order.append(name) or function(*arguments, **named)

    torch.cuda.empty_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compile_plan", "_load", "warm_up"):
            patch.setattr(engine_start, name, noted(name))
        began = time.perf_counter()
        scheduler, runner, ready = engine_start.start(config)
        seconds = time.perf_counter() - began
    launched: list[CompileRequest] = []
    launch.OBSERVERS.append(launched.append)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    for i, count in enumerate((1, 3, 12, 17, 40, 120, 440, 900)):
        scheduler.add(Request(i, [5 + j % 300 for j in range(count)], params))
    while (plan := scheduler.plan()) is not None:
        scheduler.apply(plan, runner.run(plan))
    launch.OBSERVERS.remove(launched.append)
    return Started(scheduler, runner, ready, order, launched, seconds)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """With nothing compiled and nothing tested before."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIREBOX_CACHE_DIR", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "binaries"))
        engine = started()
        print(f"cold start: {engine.seconds:.1f} s")
        print(explanation(engine.ready))
        yield engine


def reason(ready: Ready, words: str) -> str:
    (found,) = [line for line in ready.reasons if words in line]
    return found


def test_plan_and_test_come_before_the_model(first: Started) -> None:
    assert first.order == ["compile_plan", "_load", "warm_up"]
    compiled = reason(first.ready, "launch plan:")
    count = int(compiled.split()[2])
    assert count > 60 and f"{count} of them new" in compiled
    assert "all within their limits" in reason(first.ready, "self-test:")
    assert "not tested" not in reason(first.ready, "self-test:")


@pytest.mark.parametrize("problem", [QWEN, QWEN_TP4])
def test_the_recurrence_of_a_gated_delta_net_passes_its_trial(problem: Problem) -> None:
    """At Qwen3.5's sizes."""
    gpu = probe_gpu()
    assert gpu is not None
    with torch.inference_mode():
        trial = DeltaTrial(problem, Setup(gpu, torch.device("cuda"), 2048))
        results = [result for tokens in (1, 8, 9, 2048) for result in trial(tokens)]
    assert len(results) > 10 and all(result.passed for result in results), results
    assert max(result.error for result in results) > 1e-5, "nothing was compared"


def test_every_launch_is_in_the_ledger_with_its_numbers(first: Started) -> None:
    rows = [row for row in first.ready.ledger if row.how is not None]
    ours = [row for row in rows if row.shared_bytes is not None]
    assert len(ours) > 50 and all(0 <= row.shared_bytes <= row.limit_bytes for row in ours)  # type: ignore[operator]
    assert all(row.native for row in ours), [row.op for row in ours if not row.native]
    assert {row.mode for row in rows} == {"graph", "eager"}
    assert {request.kernel.__name__ for request in first.launched} <= {row.kernel for row in ours}
    experts = [row for row in ours if row.op.startswith("moe_block/experts")]
    assert {row.how for row in experts} == {"tuned"} and {row.layers for row in experts} == {2}


def test_memory_is_what_was_planned(first: Started) -> None:
    lines = {line.what: line for line in first.ready.memory}
    for line in lines.values():
        print(line.what, line.budget_bytes // MIB, (line.measured_bytes or 0) // MIB, line.why)
    for what in ("weights", "KV pages", "window pages"):
        line = lines[what]
        assert line.measured_bytes == pytest.approx(line.budget_bytes, rel=0.1), what
    for what in ("workspace", "graphs", "loader peak"):  # estimates: never more than planned
        line = lines[what]
        assert line.measured_bytes is not None and 0 < line.measured_bytes <= 1.1 * line.budget_bytes, what
    everything = lines["all"]
    assert everything.measured_bytes is not None
    assert everything.measured_bytes <= 1.1 * everything.budget_bytes


def test_a_second_start_compiles_and_tests_nothing(first: Started) -> None:
    again = started()
    print(f"warm start: {again.seconds:.1f} s")
    assert ", 0 of them new" in reason(again.ready, "launch plan:")
    assert reason(again.ready, "self-test:") == "self-test: this plan has passed on this GPU before"
    assert again.ready.ledger == first.ready.ledger


def test_more_pages_than_memory_are_refused_before_loading(first: Started) -> None:
    with pytest.raises(OutOfMemory, match=r"GB of KV pages.*GB of workspace"):
        started(kv_pages=10**9)


@pytest.fixture
def broken(first: Started, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of few tokens are a tenth too large."""
    run = linear_few.run

    at = list(inspect.signature(run).parameters).index("out")

    def wrong(*arguments: Any) -> None:
        run(*arguments)
        arguments[at].mul_(1.1)

    monkeypatch.setattr(linear_few, "run", wrong)
    yield
    _veto.lift()


def test_a_wrong_launch_is_replaced_and_named(broken: None) -> None:
    engine = started(self_test="on")
    linears = [row for row in engine.ready.ledger if row.op.endswith("/linear") and row.tokens[0] == 1]
    assert linears and {row.kernel for row in linears} == {"cublas"}
    assert all("instead of few with" in row.why and "off by " in row.why for row in linears)
    assert any(line.startswith("self-test: not few with") for line in engine.ready.reasons)


def test_strict_refuses_a_wrong_launch(broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default tiles, which --strict refuses too, are let pass here."""
    monkeypatch.setattr(engine_start, "refuse_untuned", lambda *arguments: None)
    with pytest.raises(LaunchRefused, match=r"--strict: few with .* failed its test"):
        started(self_test="on", strict=True)
