"""How a gated delta net divides its work on a GPU: requests between kernels, projections between products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from firebox.hardware.base import find_gpu
from firebox.layers.delta_gpu import FEW_TOKENS, MOST_REQUESTS, parts_of
from firebox.layers.gated_delta import GatedDeltaBlock
from tests.support.dry import model_of

SIZES = {
    "hidden_size": 256,
    "head_dim": 64,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "dtype": "bfloat16",
}
CHANNELS = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }
        },
        "ignore": ["lm_head", r"re:.*in_proj_[ab]$"],
    }
}
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("counts", "few", "others"),
    [
        ([1] * 5, 5, []),
        ([FEW_TOKENS, 1, 2], 3, []),
        ([1, 2, FEW_TOKENS + 1, 1, 70], 2, [3]),
        ([70], 0, [1]),
        ([1, *[9] * (2 * MOST_REQUESTS + 3)], 1, [MOST_REQUESTS, MOST_REQUESTS, 3]),
    ],
)
def test_requests_with_few_tokens_decode_while_they_come_first(
    counts: list[int], few: int, others: list[int]
) -> None:
    starts = np.concatenate([[0], np.cumsum(counts)])
    first, rest = parts_of(starts)
    assert [len(part.requests) for part in (first, *rest)] == [few, *others]
    requests = [r for part in (first, *rest) for r in part.requests]
    tokens = [t for part in (first, *rest) for t in part.tokens]
    assert requests == list(range(len(counts))) and tokens == list(range(sum(counts)))
    for part in (first, *rest):
        assert len(part.tokens) == sum(counts[r] for r in part.requests)


@pytest.mark.parametrize(
    ("changes", "products"),
    [
        ({}, [["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]]),
        (CHANNELS, [["in_proj_qkv", "in_proj_z"], ["in_proj_b", "in_proj_a"]]),
        (BLOCKS, [["in_proj_qkv", "in_proj_z"], ["in_proj_b"], ["in_proj_a"]]),
    ],
    ids=["one format", "gates unquantised", "gates are no whole blocks"],
)
def test_projections_of_one_format_are_one_product(
    changes: dict[str, Any], products: list[list[str]]
) -> None:
    model = model_of("qwen3_5_moe_text", find_gpu("gb10"), **SIZES, **changes)
    block = model.blocks[0][0]
    assert isinstance(block, GatedDeltaBlock) and block.capturable
    assert [[path.rpartition(".")[2] for path in linear.parts] for linear in block.ins] == products
