"""The attention kernels and their backend: results under Triton's interpreter against the formula in float32,
and what the host works out for them. In every dtype on a GPU: tests/gpu/test_attention.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels import attention_decode as decode
from firebox.kernels import attention_extend as extend
from firebox.kernels._attention import FP8, Config, Problem, check, pack_tree
from firebox.kernels._attention_cases import attention, make
from tests.support.attention_interpreted import backend_cases, kernel_cases

ROOT = Path(__file__).resolve().parents[3]
RESULTS = (*kernel_cases(), *backend_cases(), "backend refilled")


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    """Name → error over tolerance, of everything that tests/support/attention_interpreted.py runs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.attention_interpreted"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", RESULTS)
def test_equals_the_formula(found: dict[str, float], name: str) -> None:
    assert found[name] < 1, f"{found[name]:.2f} of the tolerance"


def test_every_result_is_looked_at(found: dict[str, float]) -> None:
    assert set(found) == {*RESULTS, "rows left alone"}


def test_decode_leaves_requests_with_many_queries_alone(found: dict[str, float]) -> None:
    assert found["rows left alone"] == 0


@pytest.mark.parametrize("number", range(len(extend.CASES)))
def test_the_reference_equals_one_query_at_a_time(number: int) -> None:
    """In float64, straight from the definitions of positions, windows, trees and sinks."""
    case = extend.CASES[number].of(torch.float32, torch.float32)
    problem, made = case.problem, make(case)
    expected = attention(problem, made)
    page, token = problem.page_tokens, 0
    for request, (queries, context) in enumerate(case.requests):
        prefix = context - queries
        for query in range(queries):
            own = list(range(query + 1))
            if problem.tree and queries <= 64:
                own = made["tree"][request, query].nonzero().flatten().tolist()
            position = prefix + len(own) - 1
            low = max(0, position - case.window_tokens + 1) if problem.window else 0
            seen = [*range(low, prefix), *(prefix + i for i in own if prefix + i >= low or problem.tree)]
            at = torch.tensor(seen)
            slots = made["page_table"][request, at // page].long(), at % page
            head = query % problem.heads
            k, v = (
                cache[slots][:, head // problem.group].double()
                for cache in (made["k_cache"], made["v_cache"])
            )
            weights = (k @ made["q"][token, head].double() * made["scale"]).exp()
            sink = made["sinks"][head].double().exp() if problem.sinks else 0.0
            out = weights @ v / (weights.sum() + sink)
            assert torch.allclose(expected[token, head].double(), out, rtol=1e-4, atol=1e-5)
            token += 1


def test_tiles_cover_each_row_once_and_long_ones_come_first() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        queries = generator.integers(0, 90, generator.integers(1, 6))
        contexts = queries + generator.integers(0, 200, len(queries))
        group, block_m, more_than = (int(generator.choice(c)) for c in ((1, 3, 8, 128), (16, 64), (0, 16)))
        tiles = extend.list_tiles(np.cumsum([0, *queries]), contexts, group, block_m, more_than)
        assert tiles.dtype == np.int32 and tiles.flags.c_contiguous
        expected = {
            (request, row)
            for request, count in enumerate(queries)
            if count > more_than
            for row in range(0, int(count) * group, block_m)
        }
        assert len(expected) == tiles.shape[1] and expected == set(map(tuple, tiles.T.tolist()))
        keys = [
            min(contexts[r] - queries[r] + (row + block_m - 1) // group + 1, contexts[r])
            for r, row in tiles.T
        ]
        assert keys == sorted(keys, reverse=True)


def test_packed_trees_say_what_the_tree_said() -> None:
    generator = torch.Generator().manual_seed(1)
    counts = [3, 0, 64, 1, 70]
    tree = torch.rand(5, 64, 64, generator=generator) < 0.5
    query_start = np.cumsum([0, *counts])
    bits, depths = pack_tree(tree, query_start)
    assert bits.dtype == torch.int64 and depths.dtype == torch.int32 and len(bits) == len(depths) == 138
    for request, count in enumerate(counts[:4]):
        for query in range(count):
            token = query_start[request] + query
            word = int(bits[token]) % 2**64
            assert [bool(word >> own & 1) for own in range(64)] == tree[request, query].tolist()
            assert depths[token] == tree[request, query].sum() - 1
    with pytest.raises(AssertionError, match="3"):
        pack_tree(tree[:, :2, :2], np.array([0, 3, 3, 5, 6, 7]))


@pytest.mark.parametrize("places", [96, 132, 264, 376])
@pytest.mark.parametrize(
    ("requests", "kv_heads"), [(1, 8), (1, 1), (3, 2), (8, 8), (40, 8), (64, 2), (256, 2)]
)
def test_splits_fill_the_gpu_and_not_much_more(places: int, requests: int, kv_heads: int) -> None:
    blocks = requests * kv_heads
    splits = decode.split_count(blocks, (131_072, 131_072), places, 64)
    busy = blocks * splits / (-(-blocks * splits // places) * places)  # of the places in all waves
    assert busy > 0.65 or splits == decode.MAX_SPLITS
    assert blocks * splits <= places or splits <= 4


def test_splits_follow_the_contexts() -> None:
    def count(longest: int, mean: int) -> int:
        return decode.split_count(64, (longest, mean), 264, 64)

    assert count(1, 1) == count(64 * decode.MIN_TILES, 256) == 1  # nothing to divide
    assert count(1024, 1024) <= 4
    assert count(131_072, 4096) > 8 * count(131_072, 131_072)  # one long request among short ones
    assert count(10**7, 10**4) == decode.MAX_SPLITS
    whole = 64 * decode.WHOLE_TILES
    assert decode.split_count(8, (whole, whole), 264, 64, decode.WHOLE_TILES) == 1
    assert decode.split_count(8, (whole + 1, whole), 264, 64, decode.WHOLE_TILES) == 3


def test_wide_tiles_count_as_what_they_hold() -> None:
    """As many keys are one split, and as many a split at least, whatever the tile; but a tile is whole."""
    problem, latent = Problem(32, 4, 128, 128, 64), Problem(128, 1, 576, 512, 64)
    for block_n, fewest, whole in ((32, 4, 8), (64, 4, 8), (128, 2, 4), (256, 1, 2), (512, 1, 1)):
        config = Config(16, block_n, 8, 2)
        assert (decode.min_tiles(problem, config), decode.whole_tiles(problem, config)) == (fewest, whole)
        assert decode.min_tiles(latent, config) == decode.whole_tiles(latent, config) == decode.MIN_TILES
    h200 = find_gpu("h200")
    assert [decode.places(problem, Config(16, n, 8, 2), h200) // h200.sms for n in (64, 128, 256)] == [
        2,
        2,
        1,
    ]
    wide = decode.split_count(4, (32_768, 32_768), h200.sms, 256, 2, 1)
    assert 4 * wide <= h200.sms and wide >= 32


def test_tensors_laid_out_otherwise_are_refused() -> None:
    problem = Problem(4, 2, 64, 64, 16)
    k = torch.zeros(3, 16, 2, 64, dtype=torch.bfloat16)
    q = torch.zeros(5, 4, 64, dtype=torch.bfloat16)
    check(problem, q, k, k.clone())
    with pytest.raises(AssertionError, match="v_cache has strides"):
        check(problem, q, k, torch.zeros(3, 2, 16, 64).transpose(1, 2))
    with pytest.raises(AssertionError, match="is not aligned"):
        check(problem, torch.zeros(5 * 256 + 1, dtype=torch.bfloat16)[1:].view(5, 4, 64), k, k)
    with pytest.raises(AssertionError):
        check(problem, q.transpose(0, 1).contiguous().transpose(0, 1), k, k)


@pytest.mark.parametrize("kernel", [decode, extend])
def test_a_kernel_says_what_it_cannot_run(kernel) -> None:
    problem, gb10 = Problem(64, 8, 128, 128, 64), find_gpu("gb10")
    assert kernel.accepts(problem, gb10) is None
    assert kernel.accepts(problem, probe_cpu()) == "runs on NVIDIA GPUs"
    assert "head_dim" in kernel.accepts(replace(problem, head_dim=80, value_dim=80), gb10)
    fp8 = replace(problem, kv_dtype=FP8)
    assert kernel.accepts(fp8, gb10) is None and "no fp8 cache on a100" in kernel.accepts(
        fp8, find_gpu("a100")
    )


def test_a_block_holds_the_rows_of_a_group() -> None:
    gb10, h200 = find_gpu("gb10"), find_gpu("h200")
    gqa = Problem(64, 8, 128, 128, 64)
    assert [decode.block_rows(gqa, gb10, queries) for queries in (1, 3, 8, 16)] == [16, 32, 64, 64]
    wide, narrow = (Problem(heads, 1, 576, 512, 64) for heads in (128, 16))
    assert [decode.block_rows(wide, gpu, 1) for gpu in (gb10, h200)] == [32, 64]
    for problem, gpu, blocks in ((gqa, gb10, 2), (gqa, h200, 2), (narrow, h200, 2), (wide, h200, 1)):
        assert decode.places(problem, decode.default(problem, gpu, 1), gpu) == gpu.sms * blocks
    assert Config(16, 64, 4, 3) in decode.search_space(gqa, h200, 1)
    assert extend.default(gqa, h200) in extend.search_space(gqa, h200)
