"""The launch plan before the port opens: compiled before any weight is read, refused with its numbers, and in
the ledger row by row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine import outline as engine_outline
from firebox.engine import self_test
from firebox.engine import start as engine_start
from firebox.engine.launch_plan import compile_plan, refuse, summary
from firebox.engine.ledger import launch_rows
from firebox.engine.messages import LedgerRow
from firebox.engine.outline import make_model
from firebox.engine.self_test import Findings
from firebox.engine.trials import Result, Setup
from firebox.errors import ConfigError, LaunchRefused
from firebox.hardware.base import find_gpu
from firebox.kernels import _tuned, _veto
from firebox.kernels.compile import Compiled, CompileRequest
from firebox.kernels.plan import Planned, Setting
from firebox.layers import dense_gpu, launches
from firebox.layers.launches import Launch
from firebox.models import qwen3_moe
from tests.support.dry import model_of
from tests.support.planning import opened

GB10, H200 = find_gpu("gb10"), find_gpu("h200")
BASE = Compiled("k", 121, 101_376, True, False, None, 0.1, "3.9", "13", shared_bytes=1000)
SMALL = {"hidden_size": 256, "head_dim": 64, "dtype": "bfloat16", "moe_intermediate_size": 128}


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[bool]]]:
    """Compiles end as told from now on; kernels whose name is in `only`, others well. The list says of every
    batch of compiles whether binaries were kept."""

    def ends(
        only: str = "", when: Callable[[CompileRequest], bool] = lambda request: True, **changes: Any
    ) -> list[bool]:
        batches: list[bool] = []

        def compile_all(requests: Sequence[CompileRequest], *, keep_binaries: bool = False) -> list[Compiled]:
            batches.append(keep_binaries)
            names = [request.kernel.__name__ for request in requests]
            found = [dataclasses.replace(BASE, kernel=name, instruction="none") for name in names]
            return [
                dataclasses.replace(compiled, **changes)
                if only in compiled.kernel and when(request)
                else compiled
                for compiled, request in zip(found, requests, strict=True)
            ]

        monkeypatch.setattr(launches, "compile_all", compile_all)
        return batches

    _veto.lift()
    yield ends
    _veto.lift()


def plan(strict: bool = False) -> tuple[Launch, ...]:
    return replaced(strict)[0]


def replaced(strict: bool = False) -> tuple[tuple[Launch, ...], list[str]]:
    """The plan, and what it says of other candidates."""
    model = model_of("qwen3_moe", GB10, **SMALL)
    return compile_plan(model, Setting(GB10), 100, strict=strict)


def test_what_does_not_fit_is_refused_with_its_bytes(outcome: Callable[..., list[bool]]) -> None:
    batches = outcome("decode", shared_bytes=101_376)
    assert plan(strict=True) and batches == [True], "binaries are kept for the launchers"
    outcome("decode", shared_bytes=101_377)
    with pytest.raises(LaunchRefused) as caught:
        plan()
    message = str(caught.value)
    assert message.startswith("attention_block, attention: attention_decode at 1 to 100 tokens: ")
    assert "101377 bytes of shared memory of 101376" in message and "and 1 more" in message
    assert "firebox tune" in (caught.value.hint or "")


def test_what_does_not_compile_is_refused_with_the_compilers_words(
    outcome: Callable[..., list[bool]],
) -> None:
    outcome("route", error="PassManager::run failed")
    with pytest.raises(LaunchRefused, match=r"moe_block, route: moe_route at 1 to 100 tokens: PassManager"):
        plan()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_bytes": 101_377}, "101377 bytes of shared memory of 101376"),
        ({"error": "PassManager::run failed"}, "PassManager::run failed"),
    ],
)
def test_a_tile_that_does_not_compile_or_fit_gives_way_to_the_next_candidate(
    outcome: Callable[..., list[bool]], changes: dict[str, Any], words: str
) -> None:
    batches = outcome("linear_rows", **changes)
    found, lines = replaced()
    assert len(batches) > 1 and all(launch.problem is None for launch in found)
    few = [launch.planned for launch in found if launch.planned.operation.name == "o"]
    assert {(row.path, row.first, row.last) for row in few} == {("cublas", 1, 100)}
    assert few[0].why.startswith("default; instead of few with Config(rows=")
    assert few[0].why.endswith(f", {words} at 1 tokens")
    (line,) = [line for line in lines if ", o: linear at 1 to " in line]
    assert line.startswith("launch plan: not few with Config(rows=") and line.endswith(f": {words}")
    assert ", because attention_block, o: linear at 1 to " in line
    experts = [launch.planned for launch in found if launch.planned.operation.name == "experts"]
    assert all("instead" not in row.why for row in experts), "what fits stays"
    assert replaced()[1] == [], "the choice is known by now"


def test_a_measured_tile_of_attention_that_does_not_fit_gives_way_to_the_default(
    outcome: Callable[..., list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default has no stand-in."""
    tile = {"block_m": 16, "block_n": 32, "num_warps": 8, "num_stages": 2}
    entry = {1: {"path": "extend", "config": tile}}

    class File(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return entry if key.startswith("extend") else default

    monkeypatch.setattr(_tuned, "_file", lambda gpu_name, name="experts": File())
    _veto.lift()
    outcome("extend", lambda request: request.constexprs["BLOCK_N"] == 32, shared_bytes=101_377)
    found, (line,) = replaced()
    assert line.startswith("launch plan: not paged with Config(block_m=16, block_n=32")
    extend = [launch.planned for launch in found if launch.planned.op == "attention_extend"]
    assert extend and all(row.config["block_n"] != 32 for row in extend)
    outcome("extend", shared_bytes=101_377)
    with pytest.raises(LaunchRefused, match=r"attention_extend at 17 to 100 tokens: 101377 bytes of shared"):
        replaced()


def test_strict_refuses_a_tile_that_does_not_fit(outcome: Callable[..., list[bool]]) -> None:
    batches = outcome("linear_rows", shared_bytes=101_377)
    with pytest.raises(LaunchRefused, match=r"linear at 1 to \d+ tokens: 101377 bytes of shared memory of 1"):
        plan(strict=True)
    assert len(batches) == 1


def test_where_no_candidate_fits_all_are_named_with_their_numbers(
    outcome: Callable[..., list[bool]],
) -> None:
    outcome("gate_up", shared_bytes=101_377)
    with pytest.raises(LaunchRefused) as caught:
        plan()
    said = str(caught.value)
    assert said.startswith("no launch of bf16 hidden=256 ") and "is left: " in said
    assert "few with Config(" in said and "sorted with Config(" in said
    assert said.count("101377 bytes of shared memory of 101376") >= 2
    assert "firebox tune" in (caught.value.hint or "")


def test_replaced_tiles_are_among_the_reasons(outcome: Callable[..., list[bool]]) -> None:
    outcome("linear_rows", shared_bytes=101_377)
    settings: Any = SimpleNamespace(kv_format="bf16", page_tokens=16, max_batch_tokens=100)
    model = model_of("qwen3_moe", GB10, **SMALL)
    found, reasons = engine_start._launches(model, settings, GB10, EngineConfig(self_test="off"))
    assert reasons[0].startswith("launch plan: ") and reasons[-1] == "self-test: off"
    assert len(reasons) > 2 and all(line.startswith("launch plan: not few") for line in reasons[1:-1])
    assert all(launch.fits for launch in found)


def test_emulated_instructions_are_refused_under_strict_alone(outcome: Callable[..., list[bool]]) -> None:
    outcome("linear_rows", native=False, instruction="mma.f16")
    found = plan()
    assert {row.native for row in launch_rows(found, 0) if row.kernel == "linear_rows"} == {False}
    with pytest.raises(LaunchRefused, match=r"--strict: .*linear.*written for bf16 and runs mma\.f16.*more"):
        plan(strict=True)


def test_a_kernel_without_a_tensor_instruction_is_not_emulated(outcome: Callable[..., list[bool]]) -> None:
    """`native` False of a launch that declares none is a compiler's wonder, not a fallback."""
    outcome("normalise_rows", native=False)
    assert plan(strict=True)


def test_the_plan_is_refused_before_weights_are_read(
    outcome: Callable[..., list[bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome("sample", shared_bytes=200_000)
    (tmp_path / "config.json").write_text(json.dumps(qwen3_moe.TINY | SMALL))
    monkeypatch.setattr(engine_start, "device_of", lambda wanted, dtype: (GB10, "asked for"))
    monkeypatch.setattr(engine_start, "_load", lambda *arguments: pytest.fail("weights were read"))
    model = ModelConfig(model=str(tmp_path), dtype="bfloat16", load_format="dummy")
    with pytest.raises(LaunchRefused, match=r"sampling, sample: .*200000 bytes of shared memory of 101376"):
        engine_start.start(Config(model=model, engine=EngineConfig(kv_pages=32, context_length=64)))


class Played:
    """Stands in for the test of a plan: `failing` results, one list a test, then none."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *failing: list[Result], untested: tuple[str, ...] = ()
    ) -> None:
        self.results, self.plans, self.untested = [*failing], list[list[Planned]](), untested
        monkeypatch.setattr(self_test, "test", self.test)

    def test(self, rows: Iterable[Planned], setup: Setup) -> Findings:
        assert (setup.gpu, setup.device.type, setup.max_tokens) == (GB10, "cuda", 2048)
        self.plans.append(list(rows))
        return Findings(tuple(self.results.pop(0) if self.results else ()), self.untested, 0.1)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
    """Starts an engine for a GPU that is not here, as far as the weights; what was logged until then."""

    class Weights(Exception):
        pass

    def load(*arguments: Any) -> None:
        raise Weights

    (tmp_path / "config.json").write_text(json.dumps(qwen3_moe.TINY | SMALL))
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_start, "device_of", lambda wanted, dtype: (GB10, "asked for"))
    for module in (engine_outline, engine_start):
        monkeypatch.setattr(module, "make_model", cpu_model)
    monkeypatch.setattr(engine_start, "_load", load)
    monkeypatch.setattr(engine_start, "Meter", lambda gpu: None)

    def started(**settings: Any) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(self_test.log, "info", lambda text, *values: said.append(text % values))
        engine = EngineConfig(kv_pages=32, context_length=64, **settings)
        model = ModelConfig(model=str(tmp_path), dtype="bfloat16", load_format="dummy")
        with pytest.raises(Weights):
            engine_start.start(Config(model=model, engine=engine))
        return said

    yield started
    _veto.lift()


def cpu_model(checkpoint: Any, build: Any) -> Any:
    """On a device that is here."""
    return make_model(checkpoint, dataclasses.replace(build, device=torch.device("meta")))


WRONG = Result("few with a tile", 4, 0.3, 0.01)


def test_the_plan_is_tested_before_weights_and_once(
    outcome: Callable[..., list[bool]], start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, tests = outcome(), Played(monkeypatch)
    start()
    assert len(batches) == 1 and len(tests.plans) == 1 and len(tests.plans[0]) > 20
    start()
    assert len(batches) == 2 and len(tests.plans) == 1, "it has passed before"
    start(self_test="on")
    assert len(tests.plans) == 2
    start(self_test="off")
    assert len(batches) == 4 and len(tests.plans) == 2
    start(page_tokens=32)
    assert len(tests.plans) == 3, "another plan"
    monkeypatch.setattr(self_test, "sources", lambda: "changed")
    start()
    assert len(tests.plans) == 4, "other code"
    monkeypatch.setattr(self_test, "driver_version", lambda: "changed")
    start()
    assert len(tests.plans) == 5, "another driver"


def test_a_plan_with_a_replacement_is_compiled_again_and_not_remembered(
    outcome: Callable[..., list[bool]], start: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = outcome()
    problem = linear_problem()
    choice = dense_gpu.choice_of(problem, dense_gpu.path_of(problem, 1, GB10))
    tests = Played(monkeypatch, [dataclasses.replace(WRONG, choice=choice)])
    start()
    before, after = tests.plans
    assert len(batches) == 2 and before != after
    changed = {(row.path, row.why) for row in after if row not in before}
    assert changed == {("cublas", "default; instead of few with a tile, off by 0.3 at 4 tokens")}
    start()
    assert len(tests.plans) == 3


def linear_problem() -> Any:
    """Of some product of the plan."""
    model = model_of("qwen3_moe", GB10, **SMALL)
    found = launches.layers_of(model, Setting(GB10))
    return next(o.problem for alike in found for o in alike.operations if o.name == "o")


@pytest.mark.parametrize(
    ("strict", "words"), [(False, "nothing else could run"), (True, "--strict: few with")]
)
def test_what_fails_without_another_choice_is_refused(
    outcome: Callable[..., list[bool]],
    start: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    strict: bool,
    words: str,
) -> None:
    outcome()
    monkeypatch.setattr(engine_start, "refuse_untuned", lambda *arguments: None)
    Played(monkeypatch, [WRONG])
    with pytest.raises(LaunchRefused, match=words) as caught:
        start(strict=strict)
    assert "at 4 tokens: off by 0.3, the limit is 0.01" in str(caught.value) and caught.value.hint


def test_a_launch_that_nobody_can_try_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_moe", GB10, **SMALL)
    rows = [row for _, row in launches.rows(launches.layers_of(model, Setting(GB10)), GB10, 100)]
    monkeypatch.setattr(self_test, "trial_of", lambda operation, setup: None)
    found = self_test.test(rows, Setup(GB10, torch.device("cpu"), 100))
    assert {"route", "decode", "linear_rows", "sample_rows"} <= set(found.untested) and not found.results
    assert found.sentence().endswith(f"; not tested: {', '.join(found.untested)}")


def test_what_was_not_tested_is_said_at_every_start_and_refused_under_strict(
    outcome: Callable[..., list[bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outcome()
    monkeypatch.setenv("FIREBOX_CACHE_DIR", str(tmp_path))
    tests = Played(monkeypatch, untested=("route", "decode"))
    rows = [launch.planned for launch in plan()]

    def said(strict: bool, mode: str = "auto") -> list[str]:
        setup = Setup(GB10, torch.device("cuda"), 2048)
        return list(self_test.self_test(lambda: rows, setup, mode=mode, strict=strict))

    (fresh,), (again,) = said(False), said(False)
    assert len(tests.plans) == 1 and fresh.endswith("all within their limits; not tested: route, decode")
    assert again == "self-test: this plan has passed on this GPU before; not tested: route, decode"
    for mode, tried in (("auto", 1), ("on", 2)):
        with pytest.raises(LaunchRefused, match=r"--strict: route, decode would run untested"):
            said(True, mode)
        assert len(tests.plans) == tried
    assert said(True, "off") == ["self-test: off"]


def test_what_self_test_may_be(start: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError, match="self_test is 'perhaps'") as caught:
        start(self_test="perhaps")
    assert "auto, on, off" in str(caught.value.hint)


def test_no_launch_at_all_is_no_problem() -> None:
    refuse((), strict=True)
    assert summary(()).startswith("launch plan: 0 launches")


# ---- the ledger


@pytest.fixture
def rows(outcome: Callable[..., list[bool]]) -> list[LedgerRow]:
    """gpt-oss-120b on an H200, 2,048 tokens, 64 requests."""
    outcome()
    return launch_rows(compile_plan(opened("gpt-oss-120b").model, Setting(H200), 2048, strict=False)[0], 64)


def test_every_number_of_tokens_is_in_one_row_of_a_launch(rows: list[LedgerRow]) -> None:
    """But for what few tokens do not launch."""
    for op in ("attention_block/norm/rms_norm", "moe_block/route/moe_route", "attention_block/o/linear"):
        mine = [row for row in rows if row.op == op]
        assert [n for row in mine for n in range(row.tokens[0], row.tokens[1] + 1)] == list(range(1, 2049))
        assert {row.layers for row in mine} == {36}, "windowed layers and the others launch the same"


def test_graphs_end_at_the_most_requests(rows: list[LedgerRow]) -> None:
    for row in rows:
        assert row.mode == ("graph" if row.tokens[1] <= 64 else "eager") or never(row), row
        assert row.tokens[0] > 64 or row.tokens[1] <= 64 or never(row), row
    assert {row.mode for row in rows if never(row)} == {"eager"}
    assert sum(map(never, rows)) >= 4


def never(row: LedgerRow) -> bool:
    """Launched for prompts, filters and logprobs alone."""
    return any(word in row.op for word in ("extend", "filters", "logprobs"))


def test_rows_say_where_their_tiles_come_from(rows: list[LedgerRow]) -> None:
    how = {row.op: row.how for row in rows if row.tokens[0] == 1}
    assert how["moe_block/experts/moe_gate_up"] == "tuned" and how["moe_block/norm/rms_norm"] == "default"
    gate_up = next(row for row in rows if row.op == "moe_block/experts/moe_gate_up")
    assert {"rows", "tokens", "depth"} <= set(gate_up.config) and gate_up.format == "mxfp4"
    assert (gate_up.shared_bytes, gate_up.limit_bytes, gate_up.native) == (1000, 101_376, True)
    library = next(row for row in rows if row.kernel == "cublas")
    assert (library.shared_bytes, library.instruction, library.native) == (None, None, None)


def test_rows_that_differ_are_not_folded(outcome: Callable[..., list[bool]]) -> None:
    """Neighbours of one launch with another tile, and attention with and without a window."""
    outcome()
    found, _ = compile_plan(opened("gpt-oss-120b").model, Setting(H200), 2048, strict=False)
    told: list[Launch] = []
    for launch in found:
        assert launch.compiled is None or launch.compiled.shared_bytes == 1000
        windowed = launch.planned.op == "attention_extend" and launch.planned.operation.problem.window
        size = 2000 if windowed else 1000
        compiled = launch.compiled and dataclasses.replace(launch.compiled, shared_bytes=size)
        told.append(dataclasses.replace(launch, compiled=compiled))
    extends = [row for row in launch_rows(told, 64) if row.op.endswith("attention_extend")]
    assert [(row.shared_bytes, row.layers) for row in extends] == [(2000, 18), (1000, 18)]
    same = [row for row in launch_rows(found, 64) if row.op.endswith("attention_extend")]
    assert [(row.shared_bytes, row.layers) for row in same] == [(1000, 36)]
