"""Which kernels of a GPU run experts, asked for by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from firebox.engine.ledger import ledger_rows
from firebox.errors import ConfigError
from firebox.find import load
from firebox.hardware.base import find_gpu
from firebox.kernels.select import TORCH
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.layers.moe import ON_GPU
from tests.support.small_models import small_config


def rows(backend: str, **changes: Any) -> dict[str, Any]:
    """The ledger of a small model on a GPU, by operation."""
    gpu, meta, bf16 = find_gpu("gb10"), torch.device("meta"), torch.bfloat16
    build = Build(gpu, meta, bf16, bf16, 64, moe_backend=backend, shared=Device(gpu, meta, 64))
    module = load("models", "qwen3_moe")
    module.Model(module.Config.from_hf(small_config("qwen3_moe") | changes), build)
    return {row.op: row for row in ledger_rows(build.choices, 64, "bfloat16")}


def test_the_kernels_run_unless_torch_is_asked_for() -> None:
    assert rows("auto")["moe_block"].kernel == rows(ON_GPU)["moe_block"].kernel == ON_GPU
    asked = rows(TORCH)["moe_block"]
    assert (asked.kernel, asked.why, asked.fallback) == (TORCH, "asked for", False)


def test_a_name_that_does_not_exist_or_does_not_accept_is_refused() -> None:
    with pytest.raises(ConfigError, match="no kernel 'nonsense' for experts"):
        rows("nonsense")
    odd = {"hidden_size": 52}
    with pytest.raises(ConfigError, match="cannot run these experts"):
        rows(ON_GPU, **odd)
    fallen = rows("auto", **odd)["moe_block"]
    assert fallen.kernel == TORCH and fallen.fallback and "52" in fallen.losers[ON_GPU]
