"""Runs kernels/attention_rope_decode.py on one of its cases, on a GPU or under Triton's interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _kv_write
from firebox.kernels import attention_rope_decode as kernel
from firebox.kernels._attention import Config
from firebox.kernels.attention_rope_decode import Case
from firebox.kernels.launch import Launcher
from tests.support.attention_run import GUARD, error
from tests.support.small import Difference, difference


class Found(NamedTuple):
    """`attended`: the error over the tolerance, of what the formula makes of the cache as it then is; `keys`
    and `values`: the rows of the step's tokens; `others`: rows of the cache that changed."""

    attended: float
    keys: Difference
    values: Difference
    others: int

    @property
    def right(self) -> bool:
        """Is everything as it should be?"""
        return self.attended < 1 and self.keys.explained and self.values.explained and not self.others


def run(case: Case, gpu: Gpu, made: dict[str, Any], config: Config | None = None) -> torch.Tensor:
    """The output, between guard rows, and into NaN. Raises AssertionError if a row outside was written."""
    p, qkv = case.problem, with_guards(made["qkv"])
    around = qkv.new_full((len(qkv) + 2, p.paged.heads, p.paged.head_dim), GUARD)
    out = around[1:-1].fill_(torch.nan)
    requests = kernel.requests(p, config or kernel.default(p, gpu), gpu, split=case.splits > 1)
    launchers = {name: Launcher(request) for name, request in requests.items()}
    kernel.run(
        launchers, p, qkv, made["k_cache"], made["v_cache"], made["paged"], made["scale"], out,
        splits=case.splits, window_tokens=case.window_tokens, sinks=made["sinks"],
        cache_scales=made["scales"], **kernel.given(p, made),
    )  # fmt: skip
    assert (around[[0, -1]] == GUARD).all(), "a row outside the output was written"
    return out


def with_guards(qkv: torch.Tensor) -> torch.Tensor:
    around = qkv.new_full((qkv.shape[0] + 2, qkv.shape[1]), torch.nan)
    around[1:-1] = qkv
    return around[1:-1]


def compare(case: Case, gpu: Gpu, seed: int, device: str, config: Config | None = None) -> Found:
    p, made = case.problem, kernel.inputs(case, seed, device)
    before = {name: bytes_of(made[name]).clone() for name in ("k_cache", "v_cache")}
    out = run(case, gpu, made, config)
    q, *rows = kernel.rotated(p, made)
    wanted = kernel.attended(p, made, q)
    written, others = [], 0
    for name, own, scale in zip(before, rows, made["scales"], strict=True):
        cache, slots = made[name], made["token_slots"]
        stored = _kv_write.stored(own, cache, scale)
        written.append(difference(_kv_write.rows_at(cache, slots), stored))
        changed = (bytes_of(cache) != before[name]).flatten(2).any(-1).flatten()
        changed[slots] = False
        others += int(changed.sum())
    return Found(error(out, wanted) / case.tolerance, *written, others)


def bytes_of(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8)
