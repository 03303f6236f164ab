"""The memory ledger against arithmetic by hand, and against what the makers of the checkpoints publish."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from firebox.cache.specs import LatentSpec, PagedSpec, RecurrentSpec, WindowSpec
from firebox.config import EngineConfig
from firebox.formats import awq, bf16, fp8_block, fp8_channel, fp8_tensor, gptq, int4_group, mxfp4, nvfp4
from firebox.formats.base import Cut, Format, PlainSlot, WeightSlot
from firebox.hardware.base import find_gpu
from firebox.planning._parts import shard_bytes
from firebox.planning.memory import GIB, CacheBytes, Memory, Sizes, cache_bytes, ledger, reserve_bytes
from tests.support.planning import opened, planned

META = torch.device("meta")
GB = 10**9


def memory(card: str, gpu: str = "h200", tp: int = 1, **engine: object) -> Memory:
    found = planned(card, gpu, tp, **engine).memory
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("format", "whole", "rows", "columns"),
    [
        # 512 × 1024 = 524,288 weights; on four GPUs 128 × 1024 or 512 × 256
        (bf16.Format(), 2 * 524_288, 2 * 131_072, 2 * 131_072),
        (fp8_tensor.Format(), 524_288 + 4, 131_072 + 4, 131_072 + 4),
        (fp8_channel.Format(), 524_288 + 4 * 512, 131_072 + 4 * 128, 131_072 + 4 * 512),
        (fp8_block.Format(), 524_288 + 4 * 4 * 8, 131_072 + 4 * 8, 131_072 + 4 * 4 * 2),
        (mxfp4.Format(), 262_144 + 512 * 32, 65_536 + 128 * 32, 65_536 + 512 * 8),
        (nvfp4.Format(), 262_144 + 512 * 64 + 4, 65_536 + 128 * 64 + 4, 65_536 + 512 * 16 + 4),
        # scales in the compute dtype; weight_shape: two int64
        (int4_group.Format(32), 262_160 + 1024 * 32, 65_552 + 256 * 32, 65_552 + 1024 * 8),
        # zeros: 4 bits for each group and row
        (awq.Format(128), 262_144 + 512 * 8 * 5 // 2, 65_536 + 128 * 8 * 5 // 2, 65_536 + 512 * 2 * 5 // 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)  # fmt: skip
def test_a_share_of_a_weight_is_counted_as_it_is_stored(
    format: Format, whole: int, rows: int, columns: int
) -> None:
    target = torch.empty(512, 1024, dtype=torch.bfloat16, device=META)
    for cut, tp, expected in (
        (None, 4, whole),
        (Cut(0, 512, "rows"), 1, whole),
        (Cut(0, 512, "rows"), 4, rows),
        (Cut(1, 1024, "columns"), 4, columns),
    ):
        assert shard_bytes(WeightSlot("m", format, target, cut=cut), tp) == expected, (cut, tp)


def test_a_group_index_is_counted_too() -> None:
    """GPTQ with groups of 128: codes, scales in bf16, zeros of 4 bits, and an int32 for each column."""
    target = torch.empty(512, 1024, dtype=torch.bfloat16, device=META)
    slot = WeightSlot("m", gptq.Format(128), target, cut=Cut(0, 512, "rows"))
    required = [part for part, spec in gptq.Format(128).tensors(128, 1024).items() if not spec.optional]
    index = 4 * 1024 if "g_idx" in required else 0
    assert shard_bytes(slot, 4) == 65_536 + 128 * 8 * 5 // 2 + index


def test_a_stack_of_experts_and_plain_numbers() -> None:
    stack = torch.empty(10, 512, 1024, dtype=torch.bfloat16, device=META)
    slot = WeightSlot("m", mxfp4.Format(), stack, cut=Cut(0, 512, "rows"))
    assert shard_bytes(slot, 2) == 10 * (131_072 + 256 * 32)
    bias = PlainSlot("b", torch.empty(10, 512, device=META), cut=Cut(0, 512, "rows"))
    assert shard_bytes(bias, 4) == 10 * 128 * 4
    assert shard_bytes(dataclasses.replace(bias, cut=None), 4) == 10 * 512 * 4


def test_kv_heads_are_repeated_when_there_are_fewer_than_gpus() -> None:
    target = torch.empty(8 * 128, 512, dtype=torch.bfloat16, device=META)
    slot = WeightSlot("k_proj", bf16.Format(), target, cut=Cut(0, 8, "kv", shared=True))
    assert [shard_bytes(slot, tp) for tp in (1, 8, 16)] == [2**20, 2**17, 2**17]


# ---- caches


@pytest.mark.parametrize(
    ("card", "tp", "dtype", "expected"),
    [
        ("glm-4.7-fp8", 1, "auto", 376_832),  # 92 layers · 2 · 8 heads · 128 · 2 bytes
        ("glm-4.7-fp8", 4, "auto", 94_208),
        ("glm-4.7-fp8", 8, "auto", 47_104),
        ("glm-4.7-fp8", 16, "auto", 47_104),  # 8 heads for 16 GPUs
        ("glm-4.7-fp8", 4, "fp8", 47_104),
        ("kimi-k2-thinking-nvfp4", 1, "auto", 61 * 576 * 2),
        ("kimi-k2-thinking-nvfp4", 8, "auto", 61 * 576 * 2),  # a latent row is whole everywhere
        ("gpt-oss-120b", 1, "auto", 18 * 2 * 8 * 64 * 2),  # every second layer has a window
        ("qwen3.5-397b-a17b-nvfp4", 2, "auto", 15 * 2 * 1 * 256 * 2),  # every fourth layer attends
    ],
)
def test_kv_bytes_per_token(card: str, tp: int, dtype: str, expected: int) -> None:
    assert memory(card, "h200", tp, kv_cache_dtype=dtype).cache.per_token == expected


def test_each_kind_of_cache() -> None:
    specs = [
        PagedSpec(8, 64),
        LatentSpec(512, 64),
        WindowSpec(8, 64, 128),
        RecurrentSpec(64, 3, 8, 16, 32),
        None,
    ]
    assert cache_bytes(specs, 2, 1) == CacheBytes(2048 + 1152, 128, 2048, 4 * (64 * 3 + 8 * 16 * 32))
    assert cache_bytes(specs, 1, 4) == CacheBytes(256 + 576, 128, 256, 64 * 3 + 8 * 16 * 32)


def test_what_a_running_request_takes_beside_its_tokens() -> None:
    """gpt-oss-120b, in 18 layers: a tenth of twice 10 windows of 4 pages (128 tokens and 2 pages more) and a
    step's 2,048 tokens, which are 32 pages of 64: 15 of them.
    Qwen3.5: 45 states of 64 heads of 128 × 128 and 12,288 channels of 3, float32."""
    oss = memory("gpt-oss-120b", max_running_requests=10)
    assert oss.window_request_bytes == 15 * 64 * 18 * 2048 and oss.requests_bytes == 10 * 35_389_440
    qwen = memory("qwen3.5-397b-a17b-nvfp4", tp=8)
    assert qwen.cache.state == 45 * 4 * (64 * 128 * 128 + 12_288 * 3) // 8
    assert qwen.requests_bytes == 64 * qwen.cache.state and qwen.snapshots_bytes == 2 * qwen.requests_bytes


# ---- weights


@pytest.mark.parametrize(
    ("card", "published", "unit", "within"),
    [
        ("gpt-oss-120b", 60.8, GIB, 0.05),  # model card, table 1
        ("gpt-oss-20b", 12.8, GIB, 0.05),
        ("qwen3-30b-a3b", 61.1, GB, 0.05),  # 30.53 B in bf16
        ("kimi-k2-thinking-nvfp4", 553.4, GIB, 0.5),
    ],
)
def test_weights_are_what_the_makers_publish(card: str, published: float, unit: int, within: float) -> None:
    """And up to 3 % more as kernels keep them: whole panels, padded scales, biases in float32."""
    stored = sum(part.shard_bytes(1) for part in opened(card).parts)
    assert stored / unit == pytest.approx(published, abs=within)
    assert 1 <= memory(card).weights_bytes / stored < 1.03


def test_glm_4_7_in_fp8() -> None:
    """The folder, 362 GB, repeats embedding and output matrix in the MTP layer; those are not loaded."""
    copies = 2 * 151_552 * 5120 * 2
    assert (memory("glm-4.7-fp8").weights_bytes + copies) / GB == pytest.approx(362, abs=0.5)


def test_the_experts_of_one_gpu_by_hand() -> None:
    """GLM-4.7 on four: 89 layers of 160 experts, 384 of 1536 inner rows; the down matrix keeps all 5120
    scales of its rows."""
    codes, scales = 3 * 5120 * 384, 4 * (2 * 384 + 5120)
    assert memory("glm-4.7-fp8", tp=4).weights["experts"] == 89 * 160 * (codes + scales)


def test_mtp_layers_are_a_line_of_their_own() -> None:
    """One more block, its projection of 5120 × 10240 and its norms."""
    weights = memory("glm-4.7-fp8").weights
    a_layer = weights["experts"] / 89 + weights["router_and_shared"] / 89 + weights["attention"] / 92
    assert weights["mtp"] == pytest.approx(a_layer + 5120 * 10_240, rel=0.001)
    assert memory("gpt-oss-20b").weights["mtp"] == 0


# ---- what is left


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("gb10", 10 * GIB),  # unified: more than a sixteenth of 121.6 GiB
        ("rtx-5090", GIB),  # a 32nd of 31.8 GiB is less
        ("h200", 143_155 * 2**20 // 32),
    ],
)
def test_the_reserve(gpu: str, expected: int) -> None:
    assert reserve_bytes(find_gpu(gpu)) == expected


def small(**changes: int) -> Memory:
    """10,000 bytes left for a KV cache of 10 bytes a token, of which one request needs 800 · 10."""
    cache = CacheBytes(per_token=10, window_tokens=0, per_window_token=0, state=changes.pop("state", 0))
    found = Memory(100_000, 40_000, {"a": 30_000, "b": 5000}, 10_000, 5000, cache, 0, 5, 800, 16)
    return dataclasses.replace(found, **changes)


def test_kv_tokens_are_what_the_rest_buys() -> None:
    found = small()
    assert (found.weights_bytes, found.left_bytes) == (35_000, 10_000)
    assert (found.kv_tokens, found.fits, found.missing_bytes) == (992, True, 0)  # 62 pages of 160 bytes
    windows = small(window_request_bytes=300)
    assert (windows.left_bytes, windows.kv_tokens, windows.missing_bytes) == (8500, 848, 0)
    short = small(window_request_bytes=500)
    assert (short.left_bytes, short.kv_tokens) == (7500, 736)
    assert (short.fits, short.missing_bytes) == (False, 500)
    assert (small(gpu_bytes=50_000).kv_tokens, small(gpu_bytes=50_000).missing_bytes) == (0, 48_000)


def test_snapshots_take_half_of_what_one_request_leaves() -> None:
    found = small(state=100)  # 500 for states, 1500 more than the request's 8000
    assert (found.left_bytes, found.snapshots_bytes) == (9500, 750)
    assert found.kv_tokens == (9500 - 750) // 160 * 16
    assert small(state=10).snapshots_bytes == 2 * 5 * 10


def test_workspace_and_graphs_follow_their_formulas() -> None:
    cache = CacheBytes(100, 0, 0, 0)
    engine = EngineConfig(max_batch_tokens=1024, max_running_requests=32)
    found = ledger(find_gpu("h200"), {}, cache, 7_000_000, Sizes(4096, 50_000, 40, 2), engine, 4096)
    assert found.workspace_bytes == 7_000_000 + 1024 * 8 * 4096 * 2 + 2 * 32 * 50_000 * 4
    assert found.graphs_bytes == 32 * 40 * 12 * 4096 + 32 * 50_000 * 4
    few = ledger(find_gpu("h200"), {}, cache, 0, Sizes(1, 1, 1, 2), EngineConfig(max_batch_tokens=8), 4096)
    assert few.running_requests == 8, "every running request needs a token of the step"


def test_the_expert_kernels_buffers_are_counted() -> None:
    """gpt-oss-120b at 1024 and 2048 tokens: h and y are 4 · (2880 + 2880) bf16 a token, order 4 int32;
    activations 8 · 2880 bf16. The rest does not grow but for the list of blocks, with a count each,
    4 / 16 · (3 + 1) int32."""
    more, less = (memory("gpt-oss-120b", max_batch_tokens=n).workspace_bytes for n in (2048, 1024))
    assert more - less == 1024 * (4 * 5760 * 2 + 16 + 8 * 2880 * 2 + 4)
