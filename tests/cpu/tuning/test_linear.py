"""Linear layers as tasks: which paths and tiles there are, that they compile, that what is written is what
the engine launches, and how far the estimate is from what was measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import linear as many
from firebox.kernels import linear_few as few
from firebox.kernels._experts import INT4_ZERO
from firebox.kernels._linear import Problem
from firebox.kernels.compile import Compiled, CompileRequest, compile_all
from firebox.layers import dense_gpu
from firebox.layers.dense_gpu import CUBLAS, FEW, MANY, ONE
from firebox.tuning import linear
from firebox.tuning._linear_estimate import RATES, cublas_us, few_us, many_us
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort
from firebox.tuning.journal import Journal
from firebox.tuning.search import Search
from tests.support.tuned import TunedFolder, tuned_folder

__all__ = ["tuned_folder"]

FP8 = Problem(3584, 5120, "fp8_channel")
BF16 = Problem(2880, 4096, "bf16", bias=True, residual=True)
INT4 = Problem(1024, 2048, INT4_ZERO, 128)
H200 = find_gpu("h200")
GPUS = [H200, find_gpu("gb10")]


def candidates(problem: Problem, tokens: int, gpu: str = "h200") -> list[Candidate]:
    return list(linear.candidates(linear.task(problem, tokens), find_gpu(gpu)))


@pytest.mark.parametrize(
    ("problem", "tokens", "paths"),
    [
        (FP8, 1, {ONE, FEW}),
        (FP8, 2, {FEW}),
        (INT4, 1, {FEW}),
        (FP8, 15, {FEW}),
        (FP8, 16, {FEW, MANY, CUBLAS}),
        (FP8, 64, {FEW, MANY, CUBLAS}),
        (FP8, 65, {MANY, CUBLAS}),
        (replace(FP8, out_dtype="f32"), 65, {MANY}),
        (replace(FP8, format="fp8_block"), 65, {MANY}),
        (INT4, 512, {MANY}),
        (BF16, 1, {ONE, FEW, CUBLAS}),
        (BF16, 64, {FEW, MANY, CUBLAS}),
        (BF16, 65, {MANY, CUBLAS}),
        (BF16, 4096, {CUBLAS}),
    ],
)
def test_which_paths_a_number_of_tokens_may_take(problem: Problem, tokens: int, paths: set[str]) -> None:
    found = candidates(problem, tokens)
    assert {candidate.path for candidate in found} == paths
    assert len({candidate.name for candidate in found}) == len(found), "names tell candidates apart"
    assert all((candidate.request is None) == (candidate.path == CUBLAS) for candidate in found)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("problem", [FP8, BF16, INT4], ids=lambda p: p.format)
def test_the_stock_choice_is_a_candidate_and_nothing_measured(
    problem: Problem, gpu: object, tuned_folder: TunedFolder
) -> None:
    for tokens in (1, 5, 16, 33, 64, 65, 700, 4096):
        task = linear.task(problem, tokens)
        stock = linear.stock(task, gpu)
        path = dense_gpu.path_of(problem, tokens, gpu)
        assert (stock.path, stock.parts[linear.WHOLE].config) == (path.name, path.config)
        assert stock.parts[linear.WHOLE] in list(linear.candidates(task, gpu))


def test_a_measurement_does_not_change_what_is_stock(tuned_folder: TunedFolder) -> None:
    task = linear.task(FP8, 4)
    other = next(c for c in linear.candidates(task, H200) if c not in linear.stock(task, H200).parts.values())
    before = linear.stock(task, H200)
    entry = linear.entry(Option(FEW, {linear.WHOLE: other}, 1.0))
    tuned_folder.write(H200, linear.FILE, {task.key: {"4": entry}})
    assert dense_gpu.path_of(FP8, 4, H200).config == other.config
    assert linear.stock(task, H200) == before


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_what_is_written_is_what_the_engine_launches(gpu: object, tuned_folder: TunedFolder) -> None:
    """Every path, through the file: the same path, tile and compile."""
    for problem, tokens in ((FP8, 1), (FP8, 3), (FP8, 64), (FP8, 300), (BF16, 16), (BF16, 300), (INT4, 100)):
        task = linear.task(problem, tokens)
        found = list(linear.candidates(task, gpu))
        for candidate in [*found[::5], *(c for c in found if c.path == CUBLAS)]:
            option = Option(candidate.path, {linear.WHOLE: candidate}, 12.5)
            entry = linear.entry(option) | {"us": option.us}
            tuned_folder.write(gpu, linear.FILE, {task.key: {str(tokens): entry}})
            path = dense_gpu.path_of(problem, tokens, gpu)
            why = "measured" + dense_gpu.multiplied(problem, candidate.path)
            assert path == dense_gpu.Path(candidate.path, candidate.config, why)
            launched = {c.op: c.request for c in dense_gpu.made(problem, tokens, gpu).compiles}
            assert launched["linear"] == candidate.request
            others = [r for op, r in launched.items() if op != "linear"]
            alone = candidate.path in (ONE, FEW)
            assert others == ([] if alone else list(linear.further_requests(task, gpu)))


def test_some_candidates_compile_and_the_stock_ones_fit() -> None:
    for gpu in GPUS:
        chosen, stock = [], []
        for problem, tokens in ((FP8, 16), (BF16, 4), (FP8, 256), (INT4, 64)):
            task = linear.task(problem, tokens)
            stock += linear.stock(task, gpu).parts.values()
            chosen += list(linear.candidates(task, gpu))[3::23]
        compiled = compile_all([c.request for c in [*stock, *chosen] if c.request is not None])
        assert [c.error for c in compiled] == [None] * len(compiled)
        assert all(c.fits and c.native for c in compiled[: len(stock)]), gpu.name


def test_every_candidate_is_an_option() -> None:
    task = linear.task(FP8, 64)
    ranked: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in linear.candidates(task, H200):
        ranked.setdefault((candidate.path, candidate.part), []).append(candidate)
    options = list(linear.options(task, ranked))
    assert [o.parts[linear.WHOLE] for o in options] == [c for found in ranked.values() for c in found]
    assert {o.path for o in options} == {FEW, MANY, CUBLAS}


# ---- the estimate

HEAD = Problem(151_936, 2048, "bf16", out_dtype="f32")
ROUTER = Problem(128, 2880, "bf16", bias=True, out_dtype="f32")
WIDE = Problem(4096, 12_288, "fp8_channel", residual=True)
# H200, torch 2.11.0, Triton 3.6.0, 2026-11-21, `benchmarks/linear.py --sweep`: microseconds of a path.
MEASURED = [
    (Problem(5120, 2048, "bf16"), 16, few.Config(32, 128, 128, 4, 2, 4), 7.9),
    (Problem(2048, 4096, "bf16", residual=True), 16, few.Config(64, 0, 128, 8, 4, 4), 7.7),
    (Problem(128, 2048, "bf16", out_dtype="f32"), 16, few.Config(32, 256, 64, 8, 2, 1), 2.6),
    (ROUTER, 64, few.Config(64, 0, 64, 11, 4, 3), 5.9),
    (HEAD, 1, few.Config(64, 128, 128, 1, 4, 4), 138.3),
    (HEAD, 64, few.Config(64, 0, 64, 1, 4, 4, True), 160.9),
    (Problem(14_336, 4096, "fp8_channel", bias=True), 1, few.Config(64, 0, 128, 7, 4, 4), 17.7),
    (WIDE, 16, few.Config(32, 256, 256, 4, 2, 3), 17.3),
    (WIDE, 64, many.Config(64, 64, 128, 4, 4), 32.8),
    (Problem(14_336, 4096, "fp8_channel", bias=True), 64, many.Config(64, 64, 128, 4, 4, tma=True), 19.9),
    (Problem(5120, 2048, "bf16"), 64, None, 8.0),
    (BF16, 64, None, 14.1),
]


@pytest.mark.parametrize(("problem", "tokens", "config", "us"), MEASURED)
def test_the_estimate_is_within_30_percent_of_what_was_measured(
    problem: Problem, tokens: int, config: object, us: float
) -> None:
    """Of tiles that won; before they are compiled, which is when most depends on the estimate."""
    task = linear.task(problem, tokens)
    path = {type(None): CUBLAS, few.Config: FEW, many.Config: MANY}[type(config)]
    candidate = Candidate(path, linear.WHOLE, config, None)
    found = linear.estimate_us(task, candidate, None, H200)
    found += linear.further_us(task, path, {linear.WHOLE: candidate}, H200)
    assert 0.7 * us < found < 1.3 * us


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_more_bytes_take_longer(tokens: int, gpu: object) -> None:
    """Rows, columns, bytes of a weight (of which less is left with many tokens, whose FP8 weights wait for
    their conversion)."""
    base = Problem(14_336, 4096, "fp8_channel")
    for more, least in (
        (replace(base, rows=2 * base.rows), 1.5),
        (replace(base, columns=2 * base.columns), 1.5),
        (replace(base, format="bf16"), 1.1 if tokens > 16 else 1.5),
    ):
        config = few.default(base, tokens, gpu)
        times = [few_us(p, tokens, config, None, gpu) for p in (base, more)]
        assert times[1] > least * times[0], more
    wide = [many_us(replace(base, rows=n), 64, many.Config(), None, gpu) for n in (4096, 16_384, 65_536)]
    library = [cublas_us(Problem(n, 4096, "bf16"), tokens, gpu) for n in (1024, 4096, 16_384, 65_536)]
    assert wide == sorted(wide) and wide[-1] > 2 * wide[0]
    assert library == sorted(library) and library[-1] > 2 * library[0]


def test_a_library_s_fp8_product_is_estimated_at_fp8_s_rates() -> None:
    """Half the time of bf16 where arithmetic decides; a bias is part of the call, a residual a launch."""
    wide = Problem(16_384, 8192, "bf16")
    plain, fp8 = (cublas_us(p, 4096, H200) for p in (wide, replace(wide, format="fp8_channel")))
    assert 0.45 * plain < fp8 < 0.55 * plain
    times = [cublas_us(replace(FP8, bias=bias), 256, H200) for bias in (False, True)]
    assert times[0] == times[1]
    assert cublas_us(replace(FP8, residual=True), 256, H200) > times[0] + RATES.term
    task, tile = linear.task(FP8, 256), many.Config()
    both = [Candidate(CUBLAS, linear.WHOLE, None, None), Candidate(MANY, linear.WHOLE, tile, None)]
    further = [linear.further_us(task, c.path, {linear.WHOLE: c}, H200) for c in both]
    assert further[0] == further[1] > 0, "activations are rounded on either path"
    assert linear.roof_us(task, CUBLAS, H200) == linear.roof_us(task, MANY, H200)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_library_s_fp8_product_is_measured_or_not_chosen(gpu: Gpu) -> None:
    """By its estimate it would win; where torch's build lacks it there is still our kernel's entry, and so
    where it is slower. Unquantised products run anywhere."""

    class Instant:
        """Knows times by path."""

        def __init__(self, library: list[float] | str) -> None:
            self.us = {CUBLAS: library, MANY: [500.0]}

        def samples(self, task: Task, candidates: Sequence[Candidate], effort: Effort) -> list[Any]:
            return [self.us[c.path] for c in candidates]

        def further(self, task: Task, option: Option, effort: Effort) -> list[float] | str:
            return [2.0]

    def chosen(problem: Problem, meter: Instant | None) -> tuple[set[str], int]:
        journal = Journal(None, gpu.name, "3.9.0")
        make = functools.partial(linear.task, problem)
        search = Search(linear, make, gpu, journal, meter, compile=all_well, keys=(2048,))
        paths = {entry.option.path for entry in search.entries()}
        return paths, search.report.dropped["is not chosen before it has run"]

    assert chosen(FP8, None) == ({MANY}, 1)
    assert chosen(FP8, Instant([50.0])) == ({CUBLAS}, 0)
    assert chosen(FP8, Instant("RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED")) == ({MANY}, 0)
    assert chosen(FP8, Instant([5000.0])) == ({MANY}, 0)
    assert chosen(BF16, None) == ({CUBLAS}, 0)


def all_well(requests: Sequence[CompileRequest], keep: bool) -> list[Compiled]:
    """As if every tile compiled and fitted."""
    return [
        Compiled(r.kernel.__name__, 90, 100_000, True, True, None, 0.0, "3.9.0", "", 1000, 128)
        for r in requests
    ]


def test_slices_that_fill_the_gpu_are_better_than_one_and_than_many() -> None:
    """A matrix of few rows: one slice leaves multiprocessors idle, more and more of them cost sums."""
    p = Problem(2048, 8192, "fp8_channel")
    times = {n: few_us(p, 16, few.Config(64, 0, 128, n, 4, 4), None, H200) for n in (1, 8, 64)}
    assert times[8] < times[1] and times[8] < times[64]


def test_slices_of_many_tokens_pay_where_tiles_are_few() -> None:
    """GLM-4.5-Air's o_proj: 64 tiles of 256 tokens, 1,024 of 4,096."""
    tile = many.Config(128, 128, 128, 4, 3, tma=True)
    for tokens, pays in ((256, True), (4096, False)):
        times = {n: many_us(WIDE, tokens, replace(tile, slices=n), None, H200) for n in (1, 2, 4)}
        assert (times[2] < times[1], times[4] < times[1]) == (pays, pays), times


def test_products_of_many_tokens_are_bound_by_arithmetic() -> None:
    """Twice the tokens, twice the time: 4,096 tokens of a square matrix are beyond any ridge."""
    p = Problem(8192, 8192, "fp8_channel")
    times = [many_us(p, tokens, many.Config(), None, H200) for tokens in (4096, 8192)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.1)
    assert 2 * 4096 * 8192**2 / times[0] / 1e6 < H200.fp8_tflop_s
