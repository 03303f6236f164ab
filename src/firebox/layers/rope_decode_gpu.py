"""Steps in which every request has one query, on an NVIDIA GPU: rotation, the write into the cache and
attention in one launch, kernels/attention_rope_decode.py, where other steps take two (attention_gpu.py).

Only where it was measured to be faster (attention.json, "rope_decode …"): on an H200 one launch saves 1.1 µs
a layer of gpt-oss at one request and 1.3 of GLM-4.5-Air, and loses as much of Qwen3 at eight. Where its
results were wrong, steps take the two launches. A tile that was measured without a limit to shared memory
has fewer keys under one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from firebox.hardware.base import Gpu
from firebox.kernels import _attention_choice, _tuned
from firebox.kernels import attention_rope_decode as kernel
from firebox.kernels._attention import Config
from firebox.kernels._veto import Choice, remembers, why_not
from firebox.kernels.attention_rope_decode import Problem
from firebox.kernels.compile import compile_all
from firebox.kernels.launch import Launcher
from firebox.kernels.plan import Compile, Made
from firebox.layers import _fitting
from firebox.layers._in_one import NOT_MEASURED, SLOWER, apart

KIND = "rope_decode"  # of entries in attention.json
MEASURED = "measured"


def choice_of(problem: Problem, config: Config) -> Choice:
    """What is vetoed."""
    return (KIND, problem, config)


@remembers
@functools.cache
def config_of(problem: Problem, gpu: Gpu, tokens: int) -> Config | None:
    """The tile for so many requests; None where they take two launches."""
    config, _ = _measured(problem, gpu, tokens)
    return None if config is None or why_not(choice_of(problem, config)) else config


def _measured(problem: Problem, gpu: Gpu, tokens: int) -> tuple[Config | None, str]:
    """The tile and how it was found; under a limit to shared memory with as many keys as fit. Where none
    does, None and why."""
    config = _attention_choice.entry(KIND, problem.paged, gpu, tokens)
    if config is None or not _fitting.is_limited(gpu):
        return config, MEASURED
    narrower = [replace(config, block_n=config.block_n >> shift) for shift in range(3)]
    compiled = compile_all([kernel.requests(problem, tile, gpu)[kernel.OP] for tile in narrower])
    own = compiled[0]
    too_much = own.error or f"{own.shared_bytes:,} of {own.limit_bytes:,} shared bytes"
    if own.fits:
        return config, MEASURED
    for tile, result in zip(narrower, compiled, strict=True):
        if result.fits:
            return tile, f"{MEASURED}; another tile, {too_much}"
    return None, f"{config}, {too_much}"


def made(problem: Problem, tokens: int, gpu: Gpu) -> Made:
    """What so many requests launch, for the plan: keys divided or not."""
    config, how = _measured(problem, gpu, tokens)
    if config is None:
        return apart("two launches", *(["", _why_not(problem, gpu)] if how == MEASURED else [how]))
    wrong = why_not(choice_of(problem, config))
    return apart("two launches", wrong) if wrong else _made(problem, config, how, gpu)


def _why_not(problem: Problem, gpu: Gpu) -> str:
    """Of one launch, where the file has no tile."""
    key = _attention_choice.key(KIND, problem.paged)
    there = _tuned.entries(gpu.name, _attention_choice.TUNED_FILE, key)
    return SLOWER if there else NOT_MEASURED


@functools.cache
def _made(problem: Problem, config: Config, how: str, gpu: Gpu) -> Made:
    whole, part = (kernel.requests(problem, config, gpu, split=split) for split in (False, True))
    choice = choice_of(problem, config)
    return Made(
        KIND,
        how,
        (
            Compile(kernel.OP, whole[kernel.OP], config, choice=choice),
            Compile(kernel.OP, part[kernel.OP], config, "keys divided", choice),
            Compile(kernel.MERGE, part[kernel.MERGE], choice=choice),
        ),
        ((_attention_choice.APART, SLOWER),),
    )


def turns(problem: Problem, max_tokens: int, gpu: Gpu) -> Iterator[int]:
    """See kernels/plan.py."""
    key = _attention_choice.key(KIND, problem.paged)
    yield from _tuned.turns(gpu.name, _attention_choice.TUNED_FILE, key)


def run(
    problem: Problem,
    config: Config,
    gpu: Gpu,
    qkv: torch.Tensor,
    cache: Any,
    plan: Any,
    scale: float,
    *,
    window_tokens: int | None = None,
    sinks: torch.Tensor | None = None,
    **given: torch.Tensor,
) -> torch.Tensor:
    """`qkv` [requests, columns] → attended [requests, heads, head_dim]; the tokens' keys and values are then
    in `cache`, a LayerCache. `plan`: triton_paged's, of a step that is `single`. `given`: what rope_write.run
    takes besides."""
    p, load = problem.paged, (plan.paged.requests, 1, plan.decode_contexts)
    divided = _attention_choice.splits(p, gpu, config, *load, window_tokens or 0)
    out = qkv.new_empty(len(qkv), p.heads, p.head_dim)
    return kernel.run(
        _launchers(problem, config, gpu, divided > 1), problem, qkv, cache.k, cache.v, plan.paged, scale, out,
        splits=divided, window_tokens=window_tokens or 0, sinks=sinks, cache_scales=cache.scales, **given,
    )  # fmt: skip


@functools.cache
def _launchers(problem: Problem, config: Config, gpu: Gpu, split: bool) -> dict[str, Launcher]:
    found: dict[str, Any] = kernel.requests(problem, config, gpu, split=split)
    return {name: Launcher(request) for name, request in found.items()}
