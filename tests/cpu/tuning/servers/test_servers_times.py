"""The analytic time: against brute force where it counts, against the hardware's roofs, and in the directions
that decide a choice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from firebox.errors import ConfigError
from firebox.hardware.base import Gpu, find_gpu
from firebox.planning._foreign_kernel import Operands, Tile
from firebox.tuning.servers.products import Product, Routing
from firebox.tuning.servers.tiles import Estimate, search_space
from firebox.tuning.servers.times import memory_bytes, predicted_us, resident

GB10 = find_gpu("gb10")
FP8 = Operands("fp8e4nv", "fp8e4nv", "fp8", "channel")
INT4 = Operands("bf16", "u8", "bf16", "group", (1, 32), int4=True)
ROUTING = Routing(160, 8)
UP = Product(ROUTING, 768, 5120, FP8, down=False)
DOWN = Product(ROUTING, 5120, 384, FP8, down=True)
LIGHT = Estimate(16_384, 96, spills=False)
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)


@pytest.mark.parametrize(("tokens", "fused"), [(1, 0), (3, 1), (20, 0), (64, 2), (300, 1)])
def test_experts_and_blocks_are_as_in_a_simulation(tokens: int, fused: int) -> None:
    routing, draw, trials = Routing(32, 4, fused), random.Random(7), 1200 if tokens < 100 else 200
    touched = blocks = 0
    for _ in range(trials):
        rows = [0] * 32 + [tokens] * fused
        for _ in range(tokens):
            for expert in draw.sample(range(32), 4):
                rows[expert] += 1
        touched += sum(count > 0 for count in rows)
        blocks += sum(-(-count // 16) for count in rows)
    assert routing.touched(tokens) == pytest.approx(touched / trials, rel=0.02)
    assert routing.blocks(tokens, 16) == pytest.approx(blocks / trials, rel=0.02)
    assert routing.rows(tokens) == tokens * (4 + fused)


def test_every_expert_always() -> None:
    assert Routing(4, 4).blocks(33, 16) == 12 and Routing(4, 4).touched(1) == 4


@pytest.mark.parametrize("product", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_nothing_is_faster_than_the_hardware(product: Product, tokens: int) -> None:
    weights = ROUTING.touched(tokens) * product.n * product.k
    floor_us = weights / (231e3)
    operations = 2 * ROUTING.rows(tokens) * product.n * product.k
    floor_us = max(floor_us, operations / 238e6)
    for tile in search_space(FP8):
        assert predicted_us(product, tokens, tile, LIGHT, GB10) > floor_us


def test_decode_is_at_the_memory_roof() -> None:
    """8 experts of 3.9 MB at 231 GB/s are 136 µs."""
    us = predicted_us(UP, 1, Tile(16, 128, 128, 4, 5), Estimate(73_728, 96, spills=False), GB10)
    assert 136 < us < 145


def test_resident_blocks() -> None:
    tile = Tile(16, 64, 64, 4, 3)

    def blocks(shared: int, registers: int) -> int:
        return resident(tile, Estimate(shared, registers, spills=False), GB10)

    assert blocks(101_376, 32) == 1  # 100 KiB of a multiprocessor, 1 KiB a block is the driver's
    assert blocks(50_176, 32) == 2 and blocks(50_177, 32) == 1
    assert blocks(1024, 255) == 2 and blocks(1024, 121) == 4  # 65,536 registers; in eights
    assert blocks(0, 16) == 12  # 1,536 threads
    assert resident(Tile(16, 64, 64, 8, 3), Estimate(0, 16, spills=False), GB10) == 6


@pytest.mark.parametrize("product", [UP, DOWN], ids=["up", "down"])
def test_the_best_of_more_tokens_is_never_a_smaller_throughput(product: Product) -> None:
    rates = [
        tokens / min(predicted_us(product, tokens, tile, LIGHT, GB10) for tile in search_space(FP8))
        for tokens in TOKENS
    ]
    assert rates == sorted(rates)


def test_what_costs_time() -> None:
    """Each in the regime where it decides."""
    many, few = Tile(128, 128, 128, 8, 3), Tile(16, 128, 128, 8, 3)
    assert predicted_us(UP, 4096, many, LIGHT, GB10) < predicted_us(UP, 4096, few, LIGHT, GB10)
    compute = replace(GB10, read_gb_s=20_000.0)  # padding counts where memory does not
    assert predicted_us(UP, 64, few, LIGHT, compute) < 0.5 * predicted_us(UP, 64, many, LIGHT, compute)
    heavy = Estimate(90_000, 96, spills=False)  # one block where twelve had fitted: more waves
    assert predicted_us(UP, 64, few, LIGHT, compute) < predicted_us(UP, 64, few, heavy, compute)
    shallow = replace(few, num_stages=2)
    fast = replace(compute, fp8_tflop_s=1e6)
    assert predicted_us(UP, 1, few, LIGHT, fast) < predicted_us(UP, 1, shallow, LIGHT, fast)


def test_int4_is_a_quarter_of_the_bytes_and_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    int4 = Product(ROUTING, 768, 5120, INT4, down=False)
    bf16 = Product(ROUTING, 768, 5120, Operands("bf16", "bf16", "bf16"), down=False)
    assert int4.w_bytes == 0.5 + 2 / 32 and bf16.w_bytes == 2
    tile = Tile(16, 128, 128, 8, 3)
    assert predicted_us(int4, 64, tile, LIGHT, GB10) < 0.5 * predicted_us(bf16, 64, tile, LIGHT, GB10)
    monkeypatch.setattr("firebox.tuning.servers.times.PORT_GB_S", 1e6)
    compute = replace(GB10, read_gb_s=20_000.0)
    assert predicted_us(int4, 64, tile, LIGHT, compute) > 1.5 * predicted_us(bf16, 64, tile, LIGHT, compute)


def test_order_of_programs_counts_where_an_expert_exceeds_l2() -> None:
    wide = Product(Routing(8, 2), 28_672, 4096, FP8, down=False)
    tile = Tile(64, 128, 128, 4, 3)
    assert memory_bytes(wide, 4096, tile, GB10, 16) < 0.5 * memory_bytes(wide, 4096, tile, GB10, 1)
    assert memory_bytes(UP, 4096, tile, GB10, 16) == memory_bytes(UP, 4096, tile, GB10, 1)
    once = 8 * 28_672 * 4096 + 4096 * 4096 + 2 * 4096 * 28_672 * 2
    assert memory_bytes(wide, 4096, tile, GB10, 16) == pytest.approx(once, rel=0.03)
    assert memory_bytes(wide, 4096, tile, GB10, 64) > 2 * once  # now the rows of a band do not stay there


@pytest.mark.parametrize("unknown", [{"bandwidth_gb_s": None, "read_gb_s": None}, {"sms": 0}])
def test_a_gpu_without_numbers(unknown: dict[str, float | None]) -> None:
    gpu: Gpu = replace(GB10, **unknown)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="of gb10 are not known"):
        predicted_us(UP, 1, Tile(16, 64, 64, 4, 3), LIGHT, gpu)
