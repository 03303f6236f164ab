"""Rotation, write and decode attention in one launch, on a GPU: every case in every type, every tile, and the
same as the two launches in whose place it stands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firebox.attention import triton_paged
from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import attention_rope_decode as kernel
from firebox.kernels import rope_write
from firebox.kernels._attention import FP8
from firebox.kernels._attention import Problem as PagedProblem
from firebox.kernels.attention_rope_decode import Case
from firebox.kernels.compile import compile_all
from firebox.kernels.launch import Launcher
from firebox.layers import rope_decode_gpu
from tests.support.attention_run import error
from tests.support.rope_decode import compare

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16
TYPES = [(BF16, BF16), (F16, F16), (BF16, FP8)]
QWEN3 = kernel.Problem(
    rope_write.Problem(32, 4, 128, 128, "head"), PagedProblem(32, 4, 128, 128, 64, BF16, BF16)
)
GPT_OSS = kernel.Problem(
    rope_write.Problem(64, 8, 64, 64), PagedProblem(64, 8, 64, 64, 64, BF16, BF16, window=True, sinks=BF16)
)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need an NVIDIA GPU"
    return found


def check(case: Case, gpu: Gpu, seed: int = 0, **options: Any) -> None:
    found = compare(case, gpu, seed, "cuda", **options)
    assert found.attended < 1, f"{found.attended:.2f} of the tolerance"
    assert found.keys.explained and found.values.explained, found
    assert found.others == 0, "rows of other tokens changed"


@pytest.mark.parametrize("dtypes", TYPES, ids=str)
@pytest.mark.parametrize("number", range(len(kernel.CASES)))
def test_equals_the_formula(gpu: Gpu, number: int, dtypes: tuple[Any, Any]) -> None:
    for seed in (0, 1):
        check(kernel.CASES[number].of(*dtypes), gpu, seed)


@pytest.mark.parametrize(("problem", "window"), [(QWEN3, 0), (GPT_OSS, 128)], ids=["qwen3", "gpt-oss"])
@pytest.mark.parametrize("splits", [1, 8])
def test_every_tile_that_a_sweep_tries(gpu: Gpu, problem: kernel.Problem, window: int, splits: int) -> None:
    contexts = (1, 63, 64, 65, 129, 300, 511, 3000)
    tiles = list(kernel.search_space(problem, gpu))
    launches = [kernel.requests(problem, tile, gpu, split=splits > 1)[kernel.OP] for tile in tiles]
    fitting = [tile for tile, made in zip(tiles, compile_all(launches), strict=True) if made.fits]
    assert len(fitting) > len(tiles) // 2
    for config in fitting:
        check(Case(problem, contexts, window, splits), gpu, config=config)


@pytest.mark.parametrize("requests", [1, 8, 64, 256])
@pytest.mark.parametrize(("problem", "window"), [(QWEN3, 0), (GPT_OSS, 128)], ids=["qwen3", "gpt-oss"])
def test_equals_the_two_launches(gpu: Gpu, problem: kernel.Problem, window: int, requests: int) -> None:
    """At the sizes that models have; rotated rows may differ where the order of a norm's sum does."""
    case = Case(problem, tuple(1 + (97 * n) % 700 for n in range(requests)), window)
    made, again = (kernel.inputs(case, 3, "cuda") for _ in range(2))
    plan = triton_paged.plan(made["query_start"], made["context_tokens"], made["page_table"])
    assert plan.single
    config = kernel.default(problem, gpu)
    masks = {"window_tokens": window or None, "sinks": made["sinks"]}
    caches = [
        SimpleNamespace(k=each["k_cache"], v=each["v_cache"], scales=each["scales"]) for each in (made, again)
    ]
    given = kernel.given(problem, made)
    one = rope_decode_gpu.run(
        problem, config, gpu, made["qkv"], caches[0], plan, made["scale"], **masks, **given
    )
    q = one.new_empty(requests, problem.rope.heads, problem.rope.head_dim)
    rope_write.run(
        Launcher(rope_write.request(problem.rope, gpu)), again["qkv"], q=q, k_cache=caches[1].k,
        v_cache=caches[1].v, **given,
    )  # fmt: skip
    two = triton_paged.run(q, caches[1], plan, made["scale"], **masks)
    assert error(one, two) < case.tolerance
    rows = [cache.k.flatten(0, 1)[made["token_slots"]] for cache in caches]
    assert (rows[0] != rows[1]).float().mean() < 2e-3


def test_a_result_does_not_change_from_run_to_run(gpu: Gpu) -> None:
    case = Case(QWEN3, (9000, 70, 4001), splits=33)
    found = [compare(case, gpu, 0, "cuda") for _ in range(5)]
    assert all(each == found[0] for each in found)
    assert found[0].attended < 1
