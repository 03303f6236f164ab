"""The benches of tuning/ on a real GPU: candidates are right by their own oracle, which notices what is
wrong, and everything that is timed runs from CUDA graphs and leaves the right numbers. Needs torch, Triton,
numpy and pytest, nothing of the engine."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels._attention import FP8
from firebox.kernels._attention import Problem as AttentionLayer
from firebox.kernels._attention_choice import DECODE, EXTEND
from firebox.kernels._experts import INT4_ZERO
from firebox.kernels._experts import Problem as ExpertProblem
from firebox.kernels._linear import Problem as LinearProblem
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.kernels.launch import OBSERVERS
from firebox.layers._invented import relative_error
from firebox.tuning import attention, experts, linear
from firebox.tuning._attention_estimate import Problem as AttentionProblem
from firebox.tuning.base import Candidate, Task
from firebox.tuning.clock import Effort, Graph, interleaved_us

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
TRIED = 4  # candidates of a task, path and part, besides the stock one
EFFORT = Effort(samples=5, sample_ms=0.5)

EXPERTS = [
    ExpertProblem(512, 256, 24, 3, "fp8_channel", residual=True),
    ExpertProblem(512, 256, 24, 3, "mxfp4", "clamped_swiglu", biases=True, residual=True),
    ExpertProblem(512, 256, 24, 3, "bf16", residual=True),
]
LINEAR = [
    LinearProblem(768, 1024, "fp8_channel", residual=True),
    LinearProblem(384, 1152, "fp8_block"),
    LinearProblem(768, 1024, "bf16", bias=True, residual=True),
    LinearProblem(160, 1024, "bf16", out_dtype="f32"),
    LinearProblem(512, 1024, INT4_ZERO, 128, bias=True),
    LinearProblem(512, 1024, "mxfp4", 32),
    LinearProblem(512, 1024, "nvfp4", 16),
]
GQA = AttentionLayer(12, 1, 128, 128, 16)
ATTENTION = [
    AttentionProblem(kernel, layer, 700, window)
    for kernel in (DECODE, EXTEND)
    for layer, window in (
        (GQA, 0),
        (replace(GQA, kv_dtype=FP8, page_tokens=64), 0),
        (AttentionLayer(16, 2, 64, 64, 16, window=True, sinks=BF16), 100),
        (AttentionLayer(16, 1, 576, 512, 64), 0),
    )
]
CASES: list[tuple[Any, Any, int]] = [
    *((experts, problem, tokens) for problem in EXPERTS for tokens in (1, 3, 16, 200)),
    *((linear, problem, tokens) for problem in LINEAR for tokens in (1, 16, 50, 300)),
    *((attention, p, tokens) for p in ATTENTION for tokens in ((1, 9) if p.kernel == DECODE else (40, 900))),
]
IDS = [f"{module.OP} {tokens} {problem}" for module, problem, tokens in CASES]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


@functools.cache
def bench_of(module: Any, problem: Any, gpu: Gpu, tokens: int) -> Any:
    return made(module, problem, gpu)(tokens)


@functools.lru_cache(1)
def made(module: Any, problem: Any, gpu: Gpu) -> Any:
    return module.bench(problem, gpu)


def some(module: Any, task: Task, gpu: Gpu) -> dict[tuple[str, str], list[Candidate]]:
    """(path, part) → stock first where it is of this path, and some others, as far as they fit."""
    ranked: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in module.candidates(task, gpu):
        ranked.setdefault((candidate.path, candidate.part), []).append(candidate)
    chosen = {key: [found[0], *found[1 :: max(1, len(found) // TRIED)]] for key, found in ranked.items()}
    requests = [c.request for found in chosen.values() for c in found if c.request is not None]
    fits = {id(r): c.fits for r, c in zip(requests, compile_all(requests, keep_binaries=True), strict=True)}
    kept = {
        key: [c for c in found if c.request is None or fits[id(c.request)]] for key, found in chosen.items()
    }
    assert all(kept.values()), f"nothing fits: {[key for key, found in kept.items() if not found]}"
    return kept


@pytest.mark.parametrize(("module", "problem", "tokens"), CASES, ids=IDS)
def test_candidates_are_right(module: Any, problem: Any, tokens: int, gpu: Gpu) -> None:
    task = module.task(problem, tokens)
    bench, wrong = bench_of(module, problem, gpu, tokens), []
    for found in some(module, task, gpu).values():
        for candidate in found:
            error, limit = bench.error(candidate)
            if not error <= limit:
                wrong.append(f"{candidate.name}: {error:.2e}, at most {limit:.0e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("module", "problem", "tokens"), CASES, ids=IDS)
def test_calls_run_from_graphs(module: Any, problem: Any, tokens: int, gpu: Gpu) -> None:
    """Candidates in turn; their results are right afterwards, too."""
    bench, task = bench_of(module, problem, gpu, tokens), module.task(problem, tokens)
    for (path, part), found in some(module, task, gpu).items():
        graphs = [Graph(bench.calls(candidate)) for candidate in found[:2]]
        for samples in interleaved_us(graphs, EFFORT):
            assert len(samples) == EFFORT.samples and all(0.2 < us < 1e5 for us in samples), (path, part)
        for candidate in found[:2]:
            error, limit = bench.error(candidate)
            assert error <= limit, candidate.name


@pytest.mark.parametrize(("module", "problem", "tokens"), CASES, ids=IDS)
def test_a_whole_launches_its_parts_and_what_is_further(
    module: Any, problem: Any, tokens: int, gpu: Gpu
) -> None:
    """Of each path its first option; candidates are right afterwards, too."""
    bench, task = bench_of(module, problem, gpu, tokens), module.task(problem, tokens)
    ranked = some(module, task, gpu)
    for option in first_options(module, task, ranked):
        parts = [bench.calls(c)[0] for c in option.parts.values()]
        whole = bench.whole(option.path, option.parts)[0]
        assert launched(whole) == launched(*parts, *bench.further(option.path, option.parts)[:1])
        assert 0.2 < interleaved_us([Graph([whole])], EFFORT)[0][0] < 1e5
        for candidate in option.parts.values():
            error, limit = bench.error(candidate)
            assert error <= limit, f"{candidate.name} after a whole layer: {error:.2e}"


def launched(*calls: Any) -> Counter[str]:
    """The kernels that these calls launch, by name."""
    found: Counter[str] = Counter()

    def see(request: CompileRequest) -> None:
        found[request.kernel.__name__] += 1

    OBSERVERS.append(see)
    try:
        for call in calls:
            call()
    finally:
        OBSERVERS.remove(see)
    return found


def first_options(module: Any, task: Task, ranked: dict[tuple[str, str], list[Candidate]]) -> Iterator[Any]:
    seen = set()
    for option in module.options(task, ranked):
        if option.path not in seen:
            seen.add(option.path)
            yield option


@pytest.mark.parametrize("problem", EXPERTS, ids=lambda p: p.format)
def test_both_paths_of_experts_have_the_same_sum(problem: ExpertProblem, gpu: Gpu) -> None:
    """What `whole` launches is the whole layer: with other kernels, from the same inputs, the same output."""
    tokens = 16
    bench, task = bench_of(experts, problem, gpu, tokens), experts.task(problem, tokens)
    sums = {}
    for option in first_options(experts, task, some(experts, task, gpu)):
        out = bench._data[0].out
        out.zero_()
        bench.whole(option.path, option.parts)[0]()
        sums[option.path] = out.float().clone()
    assert set(sums) == {"few", "sorted"}
    limit = 6e-2 if problem.format == "fp8_channel" else 8e-3
    assert relative_error(sums["sorted"], sums["few"]) < limit


@pytest.mark.parametrize("problem", LINEAR, ids=lambda p: f"{p.format} {p.out_dtype}")
def test_whole_linear_layers_replay_what_they_should(problem: LinearProblem, gpu: Gpu) -> None:
    """Every copy of the weights is the same, so the last call of a replay leaves the reference's numbers."""
    for tokens in (16, 300):
        bench, task = bench_of(linear, problem, gpu, tokens), linear.task(problem, tokens)
        for option in first_options(linear, task, some(linear, task, gpu)):
            (candidate,) = option.parts.values()
            limit = bench.error(candidate)[1]
            for calls in (bench.whole(option.path, option.parts), bench.calls(candidate)):
                graph = Graph(calls)
                graph.sample_us(0.05)  # may be the replay that set the pace
                bench._out.fill_(torch.nan)
                graph.sample_us(0.05)
                assert relative_error(bench._out[bench._checked].float(), bench._wanted) <= limit, option.path


def test_weights_are_copied_until_the_l2_cannot_hold_them(gpu: Gpu) -> None:
    wide = linear.bench(LinearProblem(8192, 4096, "bf16"), gpu).__self__  # type: ignore[attr-defined]
    bytes_of_all = sum(weights.w.nbytes for weights in wide.copies)
    assert 4 * gpu.l2_bytes <= bytes_of_all < 4 * gpu.l2_bytes + 2 * wide.copies[0].w.nbytes
    assert len({weights.w.data_ptr() for weights in wide.copies}) == len(wide.copies)


def test_pools_are_made_until_the_l2_cannot_hold_them(gpu: Gpu) -> None:
    bench = attention.bench(AttentionProblem(DECODE, AttentionLayer(64, 8, 128, 128, 64), 4096), gpu)(4)
    pools = {k.data_ptr(): k.nbytes + v.nbytes for k, v in bench._pools}  # type: ignore[attr-defined]
    assert sum(pools.values()) >= 4 * gpu.l2_bytes


def test_the_oracles_notice_other_weights_and_other_keys(gpu: Gpu) -> None:
    """One row of weights in another's place; one page of keys where another was."""
    layer = linear.bench(LinearProblem(768, 1024, "fp8_channel"), gpu)
    bench, task = layer(16), linear.task(LinearProblem(768, 1024, "fp8_channel"), 16)
    candidate = linear.stock(task, gpu).parts[linear.WHOLE]
    error, limit = bench.error(candidate)
    assert error <= limit
    w = bench._layer.copies[0].w.view(torch.uint8)  # type: ignore[attr-defined]
    w[[3, 700]] = w[[700, 3]]
    assert bench.error(candidate)[0] > limit

    problem = AttentionProblem(DECODE, GQA, 700)
    steps, step = attention.bench(problem, gpu)(2), attention.task(problem, 2)
    tile = attention.stock(step, gpu).parts[attention.WHOLE]
    error, limit = steps.error(tile)
    assert error <= limit
    pages = steps._plan.paged.page_table  # type: ignore[attr-defined]
    pages[0, 5] = pages[1, 5]
    assert steps.error(tile)[0] > limit


def test_expert_oracles_notice_other_weights(gpu: Gpu) -> None:
    problem = EXPERTS[2]
    task, bench = experts.task(problem, 16), experts.bench(problem, gpu)(16)
    parts = experts.stock(task, gpu).parts
    assert all(error <= limit for error, limit in map(bench.error, parts.values()))
    for weights in (bench._layer.gate_up, bench._layer.down):  # type: ignore[attr-defined]
        weights.w[:, [3, 200]] = weights.w[:, [200, 3]]
    assert all(error > limit for error, limit in map(bench.error, parts.values()))
