"""An engine for a GPU that is not there: real scheduler, runner, layers and launchers, but launches do
nothing. What is launched is recorded; what is computed means nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from firebox.attention import triton_paged
from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cache.pool import PoolSizes, allocate_pool
from firebox.engine.gpu_sampler import GpuSampler, parameters_of
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.find import load
from firebox.formats.kv import bf16
from firebox.formats.select import formats_of
from firebox.hardware.base import Gpu
from firebox.kernels import attention_decode, attention_extend, launch
from firebox.kernels.compile import CompileRequest
from firebox.layers.base import Build
from firebox.layers.dense_gpu import LinearKernels
from firebox.layers.device import Device
from firebox.weights.dummy import load_dummy
from firebox.weights.requantise import Requantiser

MAX_TOKENS, PAGE_TOKENS, PAGES = 160, 16, 600
CPU = torch.device("cpu")


class DryRunner(Runner):
    """Draws with the GPU's sampler; a launch that does nothing leaves token 0."""

    def __init__(self, model: Any, gpu: Gpu) -> None:
        sizes = PoolSizes(PAGES, PAGE_TOKENS, PAGES, 64)
        caches = allocate_pool(model.cache_specs, sizes, bf16, CPU, model.kv_scales)
        super().__init__(model, caches, PAGE_TOKENS, frozenset(), CPU)
        self.sampler = GpuSampler(model.head.vocab, gpu, CPU, 64)

    def _draw(self, logits: torch.Tensor, requests: Any) -> list[int]:
        rows = len(requests)
        parameters, token_ids = parameters_of(requests, CPU), torch.zeros(rows, dtype=torch.int64)
        for draw in (self.sampler.plain, self.sampler.filtered):
            draw(logits, parameters, token_ids)
        return [0] * rows

    def _logprobs(self, logits: torch.Tensor, token_ids: Any, tops: Any) -> Any:
        self.sampler.logprobs(logits, token_ids, tops)
        return super()._logprobs(logits, token_ids, tops)


def nothing_runs(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> list[CompileRequest]:
    """Launches do nothing from now on; the list to which they are added."""
    seen: list[CompileRequest] = []
    monkeypatch.setattr(launch, "OBSERVERS", [seen.append])
    monkeypatch.setattr(launch.Launcher, "_compiled", _Nothing())
    monkeypatch.setattr(triton_paged, "gpu_of", lambda device: gpu)
    for kernel in (attention_decode, attention_extend):
        monkeypatch.setattr(kernel, "attend", lambda *arguments, **options: None)
    monkeypatch.setattr(LinearKernels, "_cublas", lambda *arguments: None)
    return seen


def model_of(model_type: str, gpu: Gpu, *, requantize: bool = False, **changes: Any) -> Any:
    """The architecture's smallest model with sizes that the kernels take, with random weights in bf16, or
    with `requantize` as --requantize fp8 leaves them."""
    module = load("models", model_type)
    config = {**module.TINY, **changes}
    build = Build(
        gpu, CPU, torch.bfloat16, torch.bfloat16, 1024, format_of=formats_of(config),
        shared=Device(gpu, CPU, MAX_TOKENS),
        requantise=Requantiser(0.04, kernels=True).quantise if requantize else None,
    )  # fmt: skip
    model = module.Model(module.Config.from_hf(config), build)
    load_dummy(model)
    return model


def random_traffic(model: Any, gpu: Gpu, seed: int) -> None:
    """Prompts of 1 to 700 tokens in chunks of up to 70, in batches of up to 24 requests."""
    rng, runner = random.Random(seed), DryRunner(model, gpu)
    windows = [spec.window_tokens for spec in model.cache_specs if hasattr(spec, "window_tokens")]
    sizes = CacheSizes(PAGES, PAGE_TOKENS, windows[0] if windows else None, PAGES, 64)
    scheduler = Scheduler(
        KVCache(sizes, True), max_running_requests=24, max_batch_tokens=MAX_TOKENS,
        prefill_chunk_tokens=70, eos_token_ids=frozenset(),
    )  # fmt: skip
    for i in range(40):
        params = SamplingParams(
            max_tokens=6, temperature=rng.choice((0.0, 0.8)), top_k=rng.choice((0, 5)), seed=i,
            ignore_eos=True, logprobs=rng.choice((None, 0, 3)), repetition_penalty=rng.choice((1.0, 1.1)),
        )  # fmt: skip
        prompt = [rng.randrange(model.head.vocab) for _ in range(rng.choice((1, 3, 12, 17, 40, 120, 700)))]
        scheduler.add(Request(i, prompt, params))
        for _ in range(rng.randrange(3)):
            _step(scheduler, runner)
    while _step(scheduler, runner):
        pass


def _step(scheduler: Scheduler, runner: Runner) -> bool:
    plan = scheduler.plan()
    if plan is not None:
        scheduler.apply(plan, runner.run(plan))
    return plan is not None


class _Nothing:
    """A compiled kernel under every grid."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: None
