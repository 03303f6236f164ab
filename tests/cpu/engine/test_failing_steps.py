"""Steps that raise: who makes them raise ends with an error, the others never know, and no page is lost."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.engine.gpu_runner import CAPTURE_AGAIN_S, NO_GRAPH, GpuRunner
from firebox.engine.messages import Delta, SamplingParams
from firebox.engine.pipeline import AGAIN, Pipeline
from firebox.engine.request import Request
from firebox.engine.runner import Runner, in_words
from firebox.engine.scheduler import Chunk, Plan, Sampled, Scheduler
from firebox.errors import ConfigError, EngineDied
from firebox.find import load
from firebox.hardware.probe import GpuMemory
from tests.cpu.engine.test_pipeline import Device, Late, alone, make
from tests.cpu.engine.test_recurrent_states import StateRunner, expected_output
from tests.support.checkpoints import write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine


class Faulty(Device):
    """Raises where a poisoned request is in a step, and now and then for no reason: before a step, after it
    has written, when it is launched, or when its tokens are asked for."""

    def __init__(self, rng: random.Random, poison: set[int], share: float) -> None:
        super().__init__(rng)
        self.poison, self.share = poison, share
        self.faults, self.recovered = 0, 0
        self.launching, self.again = True, 0
        self.broken_graph = 0  # the batch size whose graph never works
        self.graphs_only = False

    def _fault(self, plan: Plan) -> bool:
        poisoned = any(chunk.request.request_id in self.poison for chunk in plan.chunks)
        return poisoned or self.rng.random() < self.share

    def _raise(self) -> None:
        self.faults += 1
        raise RuntimeError("a kernel failed")

    def may_overlap(self, plan: Plan) -> bool:
        return self.launching and super().may_overlap(plan)

    def launch(self, plan: Plan, after: Late | None = None) -> Late:
        if self._fault(plan):
            self._raise()
        step = super().launch(plan, after)
        return _FailsLater(self, step) if self.rng.random() < self.share else step  # type: ignore[return-value]

    def run(self, plan: Plan) -> list[Sampled]:
        from_graph = self.launching and self.captured(len(plan.chunks)) is not None
        self.again += from_graph
        fails = self._fault(plan) or (from_graph and len(plan.chunks) == self.broken_graph)
        if fails and self.rng.random() < 0.5:
            self._raise()
        found = super().run(plan)
        if fails:
            self._raise()
        return found

    def recover(self, error: Exception) -> None:
        self.recovered += 1

    def captured(self, rows: int) -> object:
        """Steps of one or two requests have graphs."""
        return self if rows < 3 else None

    @contextlib.contextmanager
    def eagerly(self, why: str) -> Iterator[None]:
        assert why == AGAIN
        self.launching = False
        try:
            yield
        finally:
            self.launching = True


class _FailsLater:
    """A launched step that goes wrong: its tokens never reach the host, and who takes them from the device
    takes wrong ones."""

    def __init__(self, device: Faulty, step: Late) -> None:
        self.requests, self._device, self._step = step.requests, device, step

    @property
    def tokens(self) -> list[int]:
        return [token + 1 for token in self._step.token_ids()]

    def token_ids(self) -> list[int]:
        self._step.token_ids()
        self._device._raise()
        raise AssertionError


@pytest.mark.parametrize("share", [0.0, 0.05], ids=["poison", "poison and chance"])
@pytest.mark.parametrize("seed", range(10))
def test_random_traffic(seed: int, share: float) -> None:
    rng = random.Random(seed)
    scheduler, poison = make(60), set[int]()
    device = Faulty(rng, poison, share)
    pipeline = Pipeline(scheduler, device, goes_on=True)  # type: ignore[arg-type]
    expected: dict[int, tuple[list[int], str]] = {}
    outputs: dict[int, list[int]] = {}
    ended: dict[int, Delta] = {}
    for tick in range(4000):
        if tick < 400 and rng.random() < 0.2:
            prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 30))]
            max_tokens, number = rng.randrange(1, 25), len(expected) + 1
            if rng.random() < 0.15:
                poison.add(number)
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
            scheduler.add(Request(number, list(prompt), params))
            expected[number] = alone(prompt, max_tokens)
        done = pipeline.step()
        if done is None:
            if tick >= 400:
                break
            continue
        for delta in done[1]:
            assert delta.request_id not in ended
            outputs.setdefault(delta.request_id, []).extend(delta.ids)
            if delta.finish_reason:
                ended[delta.request_id] = delta
    assert not pipeline.has_work and scheduler.cache.available_pages == 60, "pages leaked"
    for number, (ids, reason) in expected.items():
        if ended[number].finish_reason == "error":
            assert ended[number].error == "RuntimeError: a kernel failed"
            assert outputs.get(number, []) == ids[: len(outputs.get(number, []))], (
                "what came before was right"
            )
        else:
            assert (outputs[number], ended[number].finish_reason) == (ids, reason), f"request {number}"
    failed = {number for number, delta in ended.items() if delta.finish_reason == "error"}
    assert poison <= failed and len(poison) > 3
    if share == 0.0:
        assert failed == poison
    else:  # alone twice in a row: rare, and then it is told
        assert len(failed - poison) < 0.15 * len(expected) and device.faults > 30
    assert scheduler.stats().failed_requests == len(failed)
    assert device.recovered >= device.faults - 1


def test_a_graph_that_fails_is_not_the_last_word() -> None:
    """The graph of two requests always fails; launch by launch they are served."""
    scheduler, device = make(60), Faulty(random.Random(0), set(), 0.0)
    device.broken_graph = 2
    device.may_overlap = lambda plan: False  # type: ignore[method-assign]
    pipeline = Pipeline(scheduler, device, goes_on=True)  # type: ignore[arg-type]
    for number in (1, 2):
        scheduler.add(Request(number, [number], SamplingParams(max_tokens=5, ignore_eos=True)))
    found: dict[int, list[int]] = {1: [], 2: []}
    while pipeline.has_work:
        done = pipeline.step()
        for delta in done[1] if done else ():
            found[delta.request_id] += delta.ids
    assert all(len(ids) == 5 for ids in found.values()) and device.faults == 2 * 5 and device.again == 2 * 5


def test_without_going_on_the_step_raises() -> None:
    """As tests and benchmarks want it."""
    scheduler = make(60)
    pipeline = Pipeline(scheduler, Faulty(random.Random(0), {1}, 0.0))  # type: ignore[arg-type]
    scheduler.add(Request(1, [1, 2], SamplingParams(max_tokens=3)))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        pipeline.step()


def test_a_device_that_is_lost_ends_the_engine() -> None:
    class Lost(Faulty):
        def recover(self, error: Exception) -> None:
            raise EngineDied("the GPU can no longer be used") from error

    scheduler = make(60)
    pipeline = Pipeline(scheduler, Lost(random.Random(0), {1}, 0.0), goes_on=True)  # type: ignore[arg-type]
    scheduler.add(Request(1, [1, 2], SamplingParams(max_tokens=3)))
    with pytest.raises(EngineDied, match="no longer"):
        pipeline.step()


def test_recovering_lets_go_of_what_the_failed_step_held() -> None:
    """Otherwise the memory that ran out would stay taken for as long as the error is known."""
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise RuntimeError("outer") from inner

    runner = Runner.__new__(Runner)
    try:
        step()
    except RuntimeError as error:
        assert held[0]() is not None
        runner.recover(error)
        assert held[0]() is None, "a frame of the error still holds it"


# ---- the runner of a GPU, without one


def gpu_runner() -> GpuRunner:
    made = GpuRunner.__new__(GpuRunner)
    made._graphs, made._capture_again_s, made._why_eager, made._news = {}, {}, "", []
    made._strict = False
    made._device = torch.device("cuda")
    return made


def decode_plan(rows: int) -> Plan:
    params = SamplingParams(max_tokens=5, temperature=0.0)
    return Plan(tuple(Chunk(Request(i, [1, 2], params), 1, 1, True) for i in range(rows)))


def test_a_capture_that_fails_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, now_s = gpu_runner(), [100.0]
    monkeypatch.setattr("firebox.engine.gpu_runner.time.monotonic", lambda: now_s[0])

    def fails(self: GpuRunner, rows: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GpuRunner, "_capture", fails)
    monkeypatch.setattr("firebox.engine.gpu_runner.gpu_memory", lambda: GpuMemory(0, 0, 0, 0))
    with pytest.raises(torch.OutOfMemoryError):
        runner._graph(3)
    assert runner._eager_because(decode_plan(3)) == NO_GRAPH and runner.captured(3) is None
    assert runner._eager_because(decode_plan(2)) == "", "other sizes have theirs"
    assert [(graph.requests, graph.error) for graph in runner.news()] == [
        (3, "OutOfMemoryError: CUDA out of memory")
    ]
    now_s[0] += CAPTURE_AGAIN_S
    assert runner._eager_because(decode_plan(3)) == ""


def test_strict_refuses_a_model_that_no_graph_holds() -> None:
    runner = gpu_runner()
    runner.model = SimpleNamespace(attention_backend=None, not_capturable="")  # type: ignore[assignment]
    runner._strict = True
    assert runner._refusal("off") == "asked for"
    assert runner._refusal("decode") == "the attention backend plans on the host"
    for graphs in ("off", "decode"):
        with pytest.raises(ConfigError, match="--strict: decode steps run launch by launch: "):
            runner._decide(graphs)
    runner._strict = False
    runner._decide("off")
    assert runner.graph_rows == 0 and not runner.graphs_only


def test_nothing_comes_from_a_graph_while_it_must_not() -> None:
    runner = gpu_runner()
    with contextlib.suppress(KeyError), runner.eagerly("looked at"):
        assert runner._eager_because(decode_plan(1)) == "looked at"
        raise KeyError
    assert runner._eager_because(decode_plan(1)) == ""


def test_a_gpu_is_asked_whether_it_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, called = gpu_runner(), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: called.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty_cache"))
    free_mib = [500, 2]
    monkeypatch.setattr(
        "firebox.engine.gpu_runner.gpu_memory", lambda: GpuMemory(free_mib.pop(0) << 20, 0, 0, 0)
    )
    for said in ("", "; the GPU has 2 MiB of memory left"):
        error = RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
        runner.recover(error)
        assert in_words(error) == f"RuntimeError: CUBLAS_STATUS_EXECUTION_FAILED{said}"
    assert called == ["synchronize", "empty_cache"] * 2

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might …")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(
        EngineDied, match=r"no longer be used: RuntimeError: CUDA error: an illegal .* encountered$"
    ):
        runner.recover(RuntimeError("a launch failed"))


# ---- real models


def write_tiny(folder: Path, model: str) -> Path:
    folder.mkdir()
    return write_checkpoint(folder, load("models", model).TINY)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> InProcessEngine:
    return InProcessEngine(write_tiny(tmp_path_factory.mktemp("m") / "glm", "glm4_moe"), kv_pages=64)


PROMPTS = [[5, 17, 200, 3, 99], [7, 8, 9] * 9, [1, 2], [30] * 40]


def test_the_others_text_is_unchanged(engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose prompt begins with token 7 breaks every step after its fourth token."""
    expected = engine.generate(PROMPTS)
    run = Runner.run

    def broken(self: Runner, plan: Plan) -> list[Sampled]:
        found = run(self, plan)  # keys and values are written, and written again
        for chunk in plan.chunks:
            if chunk.request.token_ids[0] == 7 and chunk.request.output_tokens > 3:
                raise RuntimeError("launch failed")
        return found

    monkeypatch.setattr(Runner, "run", broken)
    free = engine.scheduler.cache.available_pages
    pipeline = Pipeline(engine.scheduler, engine.runner, goes_on=True)
    for number, prompt in enumerate(PROMPTS):
        engine.scheduler.add(Request(1000 + number, list(prompt), GREEDY))
    found: dict[int, list[int]] = {}
    ends: dict[int, Any] = {}
    while pipeline.has_work:
        done = pipeline.step()
        for delta in done[1] if done else ():
            found.setdefault(delta.request_id - 1000, []).extend(delta.ids)
            if delta.finish_reason:
                ends[delta.request_id - 1000] = (delta.finish_reason, delta.error)
    assert ends.pop(1) == ("error", "RuntimeError: launch failed") and found.pop(1) == expected[1][:4]
    assert found == {number: expected[number] for number in (0, 2, 3)}
    assert set(ends.values()) == {("length", None)}
    assert engine.scheduler.cache.available_pages == free
    monkeypatch.undo()
    assert engine.generate(PROMPTS) == expected, "the next ones are served"


# ---- recurrent states


def states(pages: int = 40) -> Scheduler:
    return Scheduler(
        KVCache(CacheSizes(pages, 4, states=12)),
        max_running_requests=3,
        max_batch_tokens=32,
        prefill_chunk_tokens=8,
        eos_token_ids=frozenset(),
    )


class BrokenStates(StateRunner):
    """Raises at the steps of these numbers: before or after it has made copies and changed states."""

    def __init__(self, scheduler: Scheduler, at: set[int], early: bool) -> None:
        super().__init__(scheduler, drafts="none")
        self.at, self.early, self.step = at, early, 0

    def may_overlap(self, plan: Plan) -> bool:
        return False

    def recover(self, error: Exception) -> None:
        pass

    def run(self, plan: Plan) -> list[Sampled]:
        self.step += 1
        if self.step in self.at and self.early:
            raise RuntimeError("before")
        found = super().run(plan)
        if self.step in self.at:
            raise RuntimeError("after")
        return found


@pytest.mark.parametrize("early", [True, False])
def test_a_step_with_states_is_not_run_twice_and_leaves_no_wrong_snapshot(early: bool) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    wanted = expected_output(prompt, 6)
    failures = 0
    for at in range(1, 10):
        scheduler = states()
        runner = BrokenStates(scheduler, {at}, early)
        pipeline = Pipeline(scheduler, runner, goes_on=True)  # type: ignore[arg-type]
        for number in (1, 2, 3):  # the same prompt: later ones start from what earlier ones left
            scheduler.add(Request(number, list(prompt), SamplingParams(max_tokens=6, ignore_eos=True)))
            ids: list[int] = []
            reason = None
            while pipeline.has_work:
                done = pipeline.step()
                for delta in done[1] if done else ():
                    ids += delta.ids
                    reason = delta.finish_reason or reason
            failures += reason == "error"
            assert ids == wanted[: len(ids)] and (reason == "error" or ids == wanted), (at, number)
        cache = scheduler.cache
        assert cache.available_pages == 40 and cache.available_states == 12, "slots leaked"
    assert failures == 9


def test_the_struct_says_so() -> None:
    delta = Delta(1, [], finish_reason="error", error="why")
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta)
    assert (again.finish_reason, again.error) == ("error", "why") and replace(again, error=None).error is None
