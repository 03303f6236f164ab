"""Runs one attention kernel on one of its cases, between guard rows and into NaN."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import attention_decode, attention_extend
from firebox.kernels._attention import Config
from firebox.kernels._attention_cases import Case

GUARD = 7.0


def run(kernel: ModuleType, case: Case, gpu: Gpu, made: dict[str, Any], config: Config | None = None) -> Any:
    """The output [tokens, heads, value_dim] of `made`. Raises AssertionError if a row outside was written."""
    problem, q = case.problem, made["q"]
    around = q.new_full((q.shape[0] + 2, problem.heads, problem.value_dim), GUARD)
    out = around[1:-1].fill_(torch.nan)
    queries = with_guards(q)
    arguments = (queries, made["k_cache"], made["v_cache"], made["paged"])
    options = {name: made[name] for name in ("window_tokens", "sinks", "scales")}
    if kernel is attention_decode:
        most = max(count for count, _ in case.requests if count <= attention_decode.MAX_QUERIES)
        config = config or kernel.default(problem, gpu, most)
        kernel.attend(
            *arguments, made["scale"], out, problem=problem, config=config, max_queries=most,
            splits=case.splits, pdl=attention_decode.depends(gpu), **options,
        )  # fmt: skip
    else:
        config = config or attention_extend.default(problem, gpu)
        tiles = kernel.list_tiles(made["query_start"], made["context_tokens"], problem.group, config.block_m)
        tiles = torch.from_numpy(tiles).to(q.device)
        kernel.attend(*arguments, tiles, made["scale"], out, problem=problem, config=config, **options)
    assert (around[[0, -1]] == GUARD).all(), "a row outside the output was written"
    return out


def with_guards(q: torch.Tensor) -> torch.Tensor:
    """The same queries between rows of NaN."""
    around = q.new_full((q.shape[0] + 2, *q.shape[1:]), torch.nan)
    around[1:-1] = q
    return around[1:-1]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS of the difference over the RMS of what is expected; NaN counts as infinite."""
    difference = (found.double() - expected.double()).pow(2).mean().sqrt()
    ratio = float(difference / expected.double().pow(2).mean().sqrt())
    return ratio if ratio == ratio else float("inf")


def cache_of(made: dict[str, Any]) -> Any:
    """What a backend's `run` reads of a LayerCache."""
    return SimpleNamespace(k=made["k_cache"], v=made["v_cache"], scales=made["scales"])
