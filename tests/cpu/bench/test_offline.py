"""`firebox bench offline`: its rows are what they say, on a CPU with the bundled model. What it leaves out,
it names."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from firebox.bench._offline import Decode, NotMeasured, Offline, Settings
from firebox.bench._step import SHOWN, Kernel, Profile, Span, experts_looked_at, summary
from firebox.bench.offline import LEAD, measure
from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cli._bench_offline import table
from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Plan, Scheduler
from firebox.errors import ConfigError
from firebox.text.folder import resolve_folder

ROOT = Path(__file__).resolve().parents[3]
TINY = resolve_folder("firebox-tiny")


def settings(*, kv_pages: int | None = None, **more: Any) -> Settings:
    engine = EngineConfig(device="cpu", threads=1, kv_pages=kv_pages)
    config = Config(model=ModelConfig(model=str(TINY)), engine=engine)
    return Settings(**{"config": config, "name": "firebox-tiny", "tokens": 6, "prefills": (), **more})


@pytest.fixture(scope="module")
def report() -> Offline:
    return measure(settings(batches=(1, 3), contexts=(40, 300, 100_000), prefills=(50, 100_000)))


def test_rows_are_consistent(report: Offline) -> None:
    assert [(row.context, row.batch) for row in report.decode] == [(40, 1), (40, 3), (300, 1), (300, 3)]
    config = json.loads((TINY / "config.json").read_text())
    kv_heads, head_dim = config["num_key_value_heads"], config["head_dim"]
    kept = config["num_hidden_layers"] * 2 * kv_heads * head_dim * 4  # float32, all layers keep every token
    for row in report.decode:
        assert row.tokens_per_s == pytest.approx(row.batch * 1e3 / row.ms_per_token)
        assert row.cache_bytes == row.batch * row.context * kept
        assert row.roof_ms == pytest.approx((row.weights_bytes + row.cache_bytes) / report.copy_gb_s / 1e6)
        assert row.share_of_roof == pytest.approx(row.roof_ms / row.ms_per_token)
        assert row.modes == {"eager/no graphs on a CPU": 6} and row.kv == "granted"
        assert row.replay_ms is row.host_ms is row.profile is row.experts is None, "a CPU has none of these"
    assert report.decode[1].weights_bytes > report.decode[0].weights_bytes, "more requests meet more experts"
    assert 1 < report.copy_gb_s < 2000 and report.device == "cpu" and report.layers == 4
    (prompt,) = report.prefill
    assert prompt.ttft_ms == sorted(prompt.runs_ms)[1] and len(prompt.runs_ms) == 3
    assert prompt.tokens_per_s == pytest.approx(50e3 / prompt.ttft_ms) and prompt.profile is None


def test_what_does_not_fit_is_named(report: Offline) -> None:
    context = report.context_tokens
    wanted = [f"decode context 100000 batch {batch}" for batch in (1, 3)]
    assert [row.what for row in report.not_measured] == ["prefill 100000", *wanted]
    assert all(str(context) in row.why and not row.failed for row in report.not_measured)


def test_the_pool_limits_batches_and_says_by_how_much() -> None:
    found = measure(settings(batches=(2, 4), contexts=(100,), kv_pages=30))
    assert [row.batch for row in found.decode] == [2]
    (missing,) = found.not_measured
    pages = -(-(100 + 6 + LEAD) // 16)
    assert f"4 requests need {4 * pages * 16} tokens" in missing.why and "holds 480" in missing.why


def test_granted_and_computed_contexts_are_the_same_work() -> None:
    counted = {}
    for granted in (True, False):
        seen: list[tuple[int, int]] = []
        run = Runner.run

        def noted(self: Runner, plan: Plan, seen: Any = seen, run: Any = run) -> Any:
            seen += [(chunk.start, chunk.count) for chunk in plan.chunks if chunk.count == 1]
            return run(self, plan)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "run", noted)
            found = measure(settings(batches=(2,), contexts=(64,), granted=granted))
        assert found.decode[0].kv == ("granted" if granted else "computed")
        counted[granted] = seen[-12:]
    assert counted[True][-1][0] in range(62, 64 + 6), "the timed steps are at the context"
    # a context that was computed has its first token already, one step ahead
    assert [start + 1 for start, _ in counted[True]] == [start for start, _ in counted[False]]


def test_computed_contexts_have_room_while_the_others_prompts_run() -> None:
    """24 prompts of 104 tokens, 64 a step: the first request goes on for 40 steps before the last begins."""
    engine = EngineConfig(
        device="cpu", threads=1, page_tokens=16, max_batch_tokens=64, prefill_chunk_tokens=64
    )
    config = Config(model=ModelConfig(model=str(TINY)), engine=engine)
    found = measure(settings(config=config, batches=(24,), contexts=(112,), granted=False))
    assert not found.not_measured and [row.batch for row in found.decode] == [24]
    assert found.context_tokens > 112 + 40 + 6 + LEAD


def test_no_row_begins_after_the_time() -> None:
    found = measure(settings(batches=(1,), contexts=(40,), prefills=(20,), within_s=0.0))
    assert not found.decode and not found.prefill
    assert [row.what for row in found.not_measured] == ["decode context 40 batch 1", "prefill 20"]
    assert all("within 0 s" in row.why for row in found.not_measured)


def test_a_row_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner.run

    def fails(self: Runner, plan: Plan) -> Any:
        if len(plan.chunks) == 3:
            raise RuntimeError("out of memory, say\nand so on")
        return run(self, plan)

    monkeypatch.setattr(Runner, "run", fails)
    rows: list[Any] = []
    found = measure(settings(batches=(3, 2), contexts=(40,)), rows.append)
    assert [type(row) for row in rows] == [NotMeasured, Decode]
    assert found.not_measured[0].failed and "out of memory, say" in found.not_measured[0].why
    assert found.decode[0].batch == 2 and found.decode[0].steps == 6


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="batches are"):
        measure(settings(batches=(0,)))


# ---- requests whose tokens count as computed


def scheduler(pages: int, **sizes: int) -> Scheduler:
    return Scheduler(
        KVCache(CacheSizes(pages, 16, **sizes), prefix_cache=False),
        max_running_requests=4,
        max_batch_tokens=64,
        prefill_chunk_tokens=16,
        eos_token_ids=frozenset(),
    )


def request(number: int, tokens: int) -> Request:
    return Request(number, [0] * tokens, SamplingParams(max_tokens=50, ignore_eos=True))


def test_a_seated_request_decodes_at_its_position() -> None:
    made = scheduler(20)
    assert made.seat(request(1, 100), 99)
    assert made.cache.allocator.free_pages == 20 - 7
    plan = made.plan()
    assert plan is not None
    assert [(chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks] == [(99, 1, True)]
    made.abort(1)
    assert made.cache.allocator.free_pages == 20


def test_a_seat_that_the_pool_does_not_hold_changes_nothing() -> None:
    made = scheduler(20)
    assert not made.seat(request(1, 400), 399)
    assert made.cache.allocator.free_pages == 20 and not made.has_work
    for number in range(4):
        assert made.seat(request(number, 10), 9)
    assert not made.seat(request(9, 10), 9), "all places are taken"
    with_states = scheduler(20, states=6)
    assert not with_states.seat(request(1, 400), 399)
    assert with_states.cache.available_states == 6


def test_a_seat_holds_only_the_window_pages_that_are_reached() -> None:
    made = scheduler(20, window_tokens=32, window_pages=8)
    assert made.seat(request(1, 200), 199)
    held = [page for page in made.running[0].holding.window_page_ids if page]  # type: ignore[union-attr]
    assert len(held) == 3 and made.cache.window_allocator.free_pages == 8 - 3
    assert made.plan() is not None
    made.abort(1)
    assert made.cache.window_allocator.free_pages == 8 and made.cache.allocator.free_pages == 20


# ---- what a step consists of


def test_summary_of_a_step() -> None:
    """Two kernels that overlap, a gap of 2 µs, and one more."""
    spans = [Span("b", 4.0, 10.0), Span("a", 0.0, 5.0), Span("a", 12.0, 20.0)]
    found = summary(spans)
    assert found.total_ms == pytest.approx(0.02) and found.launches == 3
    assert found.gaps == pytest.approx(2 / 20)
    assert [(k.name, k.launches, k.us) for k in found.kernels] == [("a", 2, 15.0), ("b", 1, 5.0)]


def test_kernels_that_are_not_shown_are_the_others() -> None:
    """20 names, each twice, of 1 to 20 µs a launch."""
    ends = list(itertools.accumulate([*range(1, 21)] * 2))
    names = [f"k{n}" for n in [*range(1, 21)] * 2]
    spans = [Span(name, end - int(name[1:]), end) for name, end in zip(names, ends, strict=True)]
    found = summary(spans)
    *shown, others = found.kernels
    assert [kernel.name for kernel in shown] == [f"k{n}" for n in range(20, 20 - SHOWN, -1)]
    assert (others.name, others.launches, others.us) == ("others", 16, 2 * 36.0)
    assert sum(kernel.us for kernel in found.kernels) == pytest.approx(found.total_ms * 1e3) == 420
    assert sum(kernel.launches for kernel in found.kernels) == found.launches == 40
    exactly = summary([Span(f"k{n}", n, n + 1) for n in range(SHOWN)])
    assert len(exactly.kernels) == SHOWN and exactly.kernels[-1].name != "others"


def test_the_table_shows_the_kernels_of_steps(report: Offline) -> None:
    """Of the smallest and largest batch at each context."""
    long = "triton_" + 80 * "x"
    profile = Profile(0.5, 0.031, 7, [Kernel(long, 4, 400.0), Kernel("others", 3, 100.0)])
    rows = [
        msgspec.structs.replace(report.decode[0], context=context, batch=batch, profile=profile)
        for context in (128, 2048)
        for batch in (1, 2, 8)
    ]
    rows.append(msgspec.structs.replace(rows[0], batch=9, profile=None))
    rows.append(msgspec.structs.replace(rows[0], batch=10, void="alike"))
    prompts = [msgspec.structs.replace(report.prefill[0], tokens=2048, profile=profile), *report.prefill]
    lines = table(msgspec.structs.replace(report, decode=rows, prefill=prompts))
    assert sum("under the profiler" in line for line in lines if line.startswith("prefill ")) == 1
    assert "prefill 2048: 0.500 ms under the profiler, 7 launches, gaps 3.1%" in lines
    at = [line for line in lines if line.startswith("context ")]
    wanted = [(context, batch) for context in (128, 2048) for batch in (1, 8)]
    assert at == [
        f"context {context}, batch {batch}: 0.500 ms under the profiler, 7 launches, gaps 3.1%"
        for context, batch in wanted
    ]
    first = lines.index(at[0])
    assert lines[first + 1].split() == [long[:60], "4", "400.0", "us", "80.0%"]
    assert lines[first + 2].split() == ["others", "3", "100.0", "us", "20.0%"]
    assert all(len(line) <= 110 for line in lines[first : first + 3])


def test_experts_are_counted_by_who_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from firebox.layers.experts import Experts

    calls = []
    monkeypatch.setattr(Experts, "__call__", lambda self, *rest: calls.append(rest))
    made = Experts.__new__(Experts)
    made.problem = SimpleNamespace(top_k=3, shared=1)  # type: ignore[assignment]
    ids = torch.tensor([[1, 2, 9], [2, 3, 9]])  # the third column is the shared expert's
    with experts_looked_at(2) as seen:
        made(torch.zeros(2, 4), ids, torch.zeros(2, 3), torch.zeros(2, 4))
        made(torch.zeros(1, 4), ids[:1], torch.zeros(1, 3), torch.zeros(1, 4))
    made(torch.zeros(2, 4), ids, torch.zeros(2, 3), torch.zeros(2, 4))
    assert seen == [3] and len(calls) == 3, "looked at two tokens, and every call was made"


# ---- the command line


def test_benchmark_of_several_models_keeps_what_it_has() -> None:
    command = [sys.executable, "benchmarks/engine.py", "--models", "nosuch,firebox-tiny:layers=1", "--json"]
    command += ["--batches", "2", "--contexts", "40", "--prefill", "", "--tokens", "4", "--budget-s", "90"]
    done = subprocess.run(
        [*command, "--", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout.splitlines()[-1])
    lost, kept = found["models"]
    assert done.returncode == 1 and "there is no model 'nosuch'" in lost["failed"], done.stderr
    assert kept["model"] == "firebox-tiny:layers=1" and kept["layers"] == 1
    assert [row["batch"] for row in kept["decode"]] == [2] and kept["decode"][0]["ms_per_token"] > 0
    assert "of roof" in done.stdout


def test_models_without_a_turn_are_listed() -> None:
    command = [sys.executable, "benchmarks/engine.py", "--models", "a,b", "--budget-s", "0", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [row["what"] for row in found["not_measured"]] == ["a", "b"] and found["models"] == []


def test_the_verb_offers_no_setting_that_it_would_not_keep() -> None:
    command = [sys.executable, "-m", "firebox", "bench", "offline", "firebox-tiny", "--no-prefix-cache"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "No such option" in done.stderr, done.stderr
