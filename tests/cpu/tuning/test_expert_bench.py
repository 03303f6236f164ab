"""A half of an expert layer that runs on its own counts nothing for the other, nor waits for it; what is to
count is told where."""

from __future__ import annotations

import pytest
import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import moe_combine, moe_down_few, moe_gate_up_few
from firebox.kernels._experts import Problem
from firebox.kernels.launch import Launcher
from firebox.layers.expert_paths import FEW, default_path, requests
from firebox.tuning import experts
from firebox.tuning._expert_bench import tables_request
from tests.support.experts import random_weights

GPU = find_gpu("h200")
PROBLEM = Problem(512, 256, 24, 3, "bf16")
TOKENS = 16


def test_halves_on_their_own_count_nothing() -> None:
    layer = requests(PROBLEM, TOKENS, default_path(PROBLEM, FEW, TOKENS, GPU), GPU)
    assert all("ready" in request.signature for request in layer.values())
    task = experts.task(PROBLEM, TOKENS)
    alone = [tables_request(PROBLEM, TOKENS, GPU)]
    assert alone[0] in list(experts.further_requests(task, GPU))
    alone += [c.request for c in experts.candidates(task, GPU) if c.path == FEW and c.request is not None]
    assert len(alone) > 100 and not any("ready" in request.signature for request in alone)


def test_a_launch_that_counts_is_told_where() -> None:
    generator = torch.Generator().manual_seed(0)
    path = default_path(PROBLEM, FEW, TOKENS, GPU)
    layer = {op: Launcher(request) for op, request in requests(PROBLEM, TOKENS, path, GPU).items()}
    gate_up = random_weights(PROBLEM, 2 * PROBLEM.inter, PROBLEM.hidden, generator, "cpu")
    down = random_weights(PROBLEM, PROBLEM.hidden, PROBLEM.inter, generator, "cpu")
    x = torch.zeros(TOKENS, PROBLEM.hidden, dtype=torch.bfloat16)
    ids = torch.zeros(TOKENS, PROBLEM.top_k, dtype=torch.int32)
    h, y = x.new_zeros(ids.numel(), PROBLEM.inter), x.new_zeros(ids.numel(), PROBLEM.hidden)
    table = ids.new_zeros(ids.numel(), 1 + TOKENS)
    with pytest.raises(AssertionError, match="nowhere to be counted"):
        moe_gate_up_few.run(layer["moe_gate_up"], PROBLEM, x, gate_up, ids, h, table)
    with pytest.raises(AssertionError, match="nothing was counted"):
        moe_down_few.run(layer["moe_down"], PROBLEM, h, down, ids, ids.float(), table, y)
    with pytest.raises(AssertionError, match="zero again"):
        moe_combine.run(layer["moe_combine"], y, x)
