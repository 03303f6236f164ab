"""Attention as a task: its tiles compile, those that are written are planned and launched, by the same rule
for every division of a step, and the estimate follows what was measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from firebox.attention import triton_paged
from firebox.attention.triton_paged import made
from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels import _attention_choice, attention_decode, attention_extend, launch
from firebox.kernels._attention import FP8, Config
from firebox.kernels._attention import Problem as Layer
from firebox.kernels._attention_choice import DECODE, EXTEND, key
from firebox.kernels.compile import CompileRequest, compile_all
from firebox.tuning import attention
from firebox.tuning._attention_estimate import Problem
from firebox.tuning.base import Candidate, Option
from tests.support.tuned import TunedFolder, tuned_folder

__all__ = ["tuned_folder"]

H200, GB10 = find_gpu("h200"), find_gpu("gb10")
BF16 = torch.bfloat16
GQA = Layer(24, 2, 128, 128, 16)
WINDOW = Layer(64, 8, 64, 64, 16, window=True, sinks=BF16)
LATENT = Layer(16, 1, 576, 512, 16)
LAYERS = [GQA, WINDOW, LATENT]


def candidates(layer: Layer, kernel: str, tokens: int, gpu: Gpu = H200) -> list[Candidate]:
    (problem,) = (p for p in attention.problems(layer) if p.kernel == kernel)
    return list(attention.candidates(attention.task(problem, tokens), gpu))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_stock_tile_is_a_candidate(layer: Layer) -> None:
    for gpu in (H200, GB10):
        for kernel, tokens, config in (
            (DECODE, 8, attention_decode.default(layer, gpu, 1)),
            (EXTEND, 512, attention_extend.default(layer, gpu)),
        ):
            (problem,) = (p for p in attention.problems(layer) if p.kernel == kernel)
            stock = attention.stock(attention.task(problem, tokens), gpu).parts[attention.WHOLE]
            assert stock.config == config
            found = candidates(layer, kernel, tokens, gpu)
            assert found[0] == stock and len(found) > 4 and len(set(found)) == len(found)


def test_each_kernel_has_the_numbers_of_tokens_that_it_serves() -> None:
    assert candidates(GQA, DECODE, 256) and not candidates(GQA, DECODE, 257)
    assert candidates(GQA, EXTEND, 17) and not candidates(GQA, EXTEND, 16)


def test_stock_and_some_other_tiles_compile() -> None:
    for gpu in (H200, GB10):
        chosen, stock = [], []
        for layer in LAYERS:
            for kernel, tokens in ((DECODE, 4), (EXTEND, 512)):
                found = candidates(layer, kernel, tokens, gpu)
                stock.append(found[0])
                chosen.append(found[5])
        compiled = compile_all([c.request for c in stock + chosen if c.request is not None])
        assert [c.error for c in compiled] == [None] * len(compiled)
        assert all(c.fits and c.native for c in compiled[: len(stock)]), gpu.name


# ---- what is written is planned and launched

DECODE_TILES = {1: Config(16, 128, 4, 3), 64: Config(16, 32, 8, 5)}
EXTEND_TILES = {32: Config(64, 32, 4, 3), 2048: Config(32, 128, 8, 3)}


def write(folder: TunedFolder, layer: Layer, gpu: Gpu) -> None:
    """Tiles that no default has, by the number of tokens."""
    entries: dict[str, Any] = {}
    for kernel, tiles in ((DECODE, DECODE_TILES), (EXTEND, EXTEND_TILES)):
        for tokens, config in tiles.items():
            candidate = Candidate(kernel, attention.WHOLE, config, None)
            entry = attention.entry(Option(kernel, {attention.WHOLE: candidate}, 1.0))
            entries.setdefault(key(kernel, layer), {})[str(tokens)] = entry | {"us": 1.0}
    folder.write(gpu, attention.FILE, entries)


def launched(
    monkeypatch: pytest.MonkeyPatch, layer: Layer, gpu: Gpu, step: list[tuple[int, int]]
) -> tuple[list[CompileRequest], dict[str, Config]]:
    """What the backend would launch for requests of (queries, context): the observed compiles, and the tile
    that each kernel was given."""
    seen: list[CompileRequest] = []
    tiles: dict[str, Config] = {}
    monkeypatch.setattr(launch, "OBSERVERS", [seen.append])
    monkeypatch.setattr(triton_paged, "gpu_of", lambda device: gpu)
    for name, kernel in ((DECODE, attention_decode), (EXTEND, attention_extend)):

        def attend(*arguments: Any, name: str = name, config: Config, **options: Any) -> None:
            tiles[name] = config

        monkeypatch.setattr(kernel, "attend", attend)
    pages = max(-(-context // layer.page_tokens) for _, context in step)
    starts = np.cumsum([0, *(queries for queries, _ in step)])
    contexts = np.array([context for _, context in step])
    plan = triton_paged.plan(starts, contexts, torch.zeros(len(step), pages, dtype=torch.int32))
    q = torch.zeros(starts[-1], layer.heads, layer.head_dim, dtype=layer.dtype)
    cache = torch.zeros(1, layer.page_tokens, layer.kv_heads, layer.head_dim, dtype=layer.kv_dtype)
    caches = SimpleNamespace(k=cache, v=cache[..., : layer.value_dim], scales=(1.0, 1.0))
    sinks = torch.zeros(layer.heads, dtype=layer.sinks) if layer.sinks else None
    window = attention.WINDOW_TOKENS if layer.window else None
    triton_paged.run(q, caches, plan, 1.0, window_tokens=window, sinks=sinks)
    return seen, tiles


STEPS = [
    [(1, 9000)],
    [(1, 300)] * 3,
    [(1, 9000)] * 7,
    [(1, 100)] * 64,
    [(2, 50), (1, 700)],
    [(16, 300)] * 2,
    [(17, 17)],
    [(1, 9000), (40, 800), (5, 5)],
    [(900, 3000)],
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("gpu", [H200, GB10], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("measured", [False, True])
def test_nothing_is_launched_that_is_not_planned(
    layer: Layer, gpu: Gpu, measured: bool, tuned_folder: TunedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if measured:
        write(tuned_folder, layer, gpu)
    for step in STEPS:
        tokens = sum(queries for queries, _ in step)
        seen, _ = launched(monkeypatch, layer, gpu, step)
        planned = [compile.request for compile in made(layer, tokens, gpu).compiles]
        assert seen and all(request in planned for request in seen), step


def test_the_nearest_measured_tile_is_launched(
    tuned_folder: TunedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the step's tokens. Three requests of two queries make 24 rows a key head: a block of 32, which the
    measured tile of 16 is not for."""
    write(tuned_folder, GQA, H200)
    wanted = {
        1: ([(1, 300)], {DECODE: DECODE_TILES[1]}),
        7: ([(1, 300)] * 7, {DECODE: DECODE_TILES[1]}),
        9: ([(1, 300)] * 9, {DECODE: DECODE_TILES[64]}),
        6: ([(2, 300)] * 3, {DECODE: attention_decode.default(GQA, H200, 2)}),
        20: ([(20, 300)], {EXTEND: EXTEND_TILES[32]}),
        900: ([(1, 9), (899, 899)], {DECODE: DECODE_TILES[64], EXTEND: EXTEND_TILES[2048]}),
    }
    for tokens, (step, tiles) in wanted.items():
        found = launched(monkeypatch, GQA, H200, step)[1]
        assert found == tiles, tokens
    other = replace(GQA, kv_dtype=FP8)
    assert launched(monkeypatch, other, H200, [(1, 300)])[1] == {
        DECODE: attention_decode.default(other, H200, 1)
    }


def test_plans_say_what_was_measured(tuned_folder: TunedFolder) -> None:
    assert made(GQA, 1, H200).why == made(GQA, 600, H200).why == "default"
    write(tuned_folder, GQA, H200)
    assert made(GQA, 1, H200).why == "measured"
    assert made(GQA, 600, H200).why == "partly measured", "requests of more queries have the default tile"
    assert made(GQA, 40, H200) is made(GQA, 41, H200), "so that the plan is walked quickly"


@pytest.mark.parametrize("layer", LAYERS)
def test_a_candidate_is_what_the_engine_launches(
    layer: Layer, tuned_folder: TunedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys divided or not, the launch that adds up included, and the splits that its bench has."""
    for kernel, tokens in ((DECODE, 1), (DECODE, 16), (DECODE, 200), (EXTEND, 64)):
        (problem,) = (p for p in attention.problems(layer) if p.kernel == kernel)
        task = attention.task(problem, tokens)
        for candidate in list(attention.candidates(task, H200))[::4]:
            option = Option(candidate.path, {attention.WHOLE: candidate}, 1.0)
            entries = {task.key: {str(tokens): attention.entry(option)}}
            tuned_folder.write(H200, attention.FILE, entries)
            seen, tiles = launched(monkeypatch, layer, H200, list(problem.requests(tokens)))
            assert seen[0] == candidate.request and tiles == {kernel: candidate.config}
            further = list(attention.further_requests(task, H200))
            assert all(request in further for request in seen[1:])


def test_keys_name_everything_that_tells_compiles_apart() -> None:
    layers = [GQA, WINDOW, LATENT, replace(GQA, kv_dtype=FP8), replace(GQA, page_tokens=64)]
    layers += [replace(GQA, tree=True), replace(GQA, window=True), replace(GQA, dtype=torch.float16)]
    keys = [key(kernel, layer) for layer in layers for kernel in (DECODE, EXTEND)]
    assert len(set(keys)) == len(keys)
    assert key(DECODE, WINDOW) == (
        "decode bfloat16 kv=bfloat16 heads=64 kv_heads=8 head_dim=64 value_dim=64 page_tokens=16 window sinks"
    )


# ---- the estimate

PAGED = {
    "gqa": Layer(64, 8, 128, 128, 64),
    "glm": Layer(24, 2, 128, 128, 64),
    "mla": Layer(16, 1, 576, 512, 64),
}
PAGED |= {"fp8": replace(PAGED["gqa"], kv_dtype=FP8), "mla 128": replace(PAGED["mla"], heads=128)}
# H200, Triton 3.6.0, 2026-11-21, docs/log/2026-11-21-gpu-kernels.md: (batch or chunk, context), microseconds.
MEASURED = [
    ("gqa", DECODE, 1, 131_072, 149), ("gqa", DECODE, 8, 8192, 71), ("gqa", DECODE, 256, 2048, 488),
    ("fp8", DECODE, 64, 4096, 204), ("glm", DECODE, 8, 8192, 26), ("mla", DECODE, 1, 131_072, 76),
    ("mla", DECODE, 256, 2048, 203), ("mla 128", DECODE, 64, 4096, 267), ("gqa", EXTEND, 8192, 8192, 2340),
    ("gqa", EXTEND, 2048, 32_768, 4457),
]  # fmt: skip


def estimated(
    layer: Layer, kernel: str, tokens: int, context: int, gpu: Gpu = H200, window: int = 0
) -> float:
    task = attention.task(Problem(kernel, layer, context, window), tokens)
    stock = attention.stock(task, gpu).parts[attention.WHOLE]
    return attention.estimate_us(task, stock, None, gpu)


@pytest.mark.parametrize(("layer", "kernel", "tokens", "context", "us"), MEASURED)
def test_the_estimate_is_within_30_percent_of_what_was_measured(
    layer: str, kernel: str, tokens: int, context: int, us: float
) -> None:
    assert 0.7 * us < estimated(PAGED[layer], kernel, tokens, context) < 1.3 * us


@pytest.mark.parametrize("gpu", [H200, GB10], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("layer", PAGED.values(), ids=PAGED)
def test_more_keys_take_longer(layer: Layer, gpu: Gpu) -> None:
    contexts = [estimated(layer, DECODE, 32, n, gpu) for n in (1024, 4096, 16_384, 65_536)]
    batches = [estimated(layer, DECODE, n, 8192, gpu) for n in (4, 32, 256)]
    chunks = [estimated(layer, EXTEND, n, 8192, gpu) for n in (64, 512, 4096, 16_384)]
    for times in (contexts, batches, chunks):
        assert times == sorted(times) and times[-1] > 3 * times[0]
    for kernel, tokens in ((DECODE, 32), (EXTEND, 512)):
        inside = estimated(layer, kernel, tokens, 16_384, gpu, window=128)
        assert inside < 0.5 * estimated(layer, kernel, tokens, 16_384, gpu)


def test_one_long_request_that_is_not_divided_would_wait_for_one_multiprocessor() -> None:
    """Splits are what makes a context of 128k as fast as memory allows: with tiles so large that there are
    few splits, most of the GPU is idle."""
    p = Problem(DECODE, PAGED["gqa"], 2048)
    small, large = (Config(16, block_n, 4, 3) for block_n in (32, 512))
    assert p.splits(1, small, H200) > p.splits(1, large, H200) > 1
    task = attention.task(p, 1)
    times = [
        attention.estimate_us(task, Candidate(DECODE, attention.WHOLE, config, None), None, H200)
        for config in (small, large)
    ]
    assert times[0] < times[1]


def test_entries_are_read_back_as_they_were(tuned_folder: TunedFolder) -> None:
    shared = Config(128, 64, 8, 3, 128)
    entry = attention.entry(Option(EXTEND, {attention.WHOLE: Candidate(EXTEND, "whole", shared, None)}, 1.0))
    assert entry == {"path": EXTEND, "config": asdict(shared)}
    tuned_folder.write(H200, attention.FILE, {key(EXTEND, GQA): {"512": entry}})
    assert _attention_choice.extend_config(GQA, H200, 600) == shared
