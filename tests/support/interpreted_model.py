"""Runs a small model as a GPU does, layer for layer and launch for launch, but on the CPU under Triton's
interpreter in float16, and prints as JSON how far its logits are from those of torch operators in float32.
With "fp8" as in --requantize: from those of the same FP8 weights (`errors`), and of the checkpoint's
(`moved`).

    TRITON_INTERPRET=1 python -m tests.support.interpreted_model MODEL FORMAT [fp8]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from firebox.attention import triton_paged
from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cache.pool import PoolSizes, allocate_pool
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.engine.start import make_model
from firebox.find import load
from firebox.hardware.base import Gpu, find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.kernels.launch import INTERPRETED
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.weights.checkpoint import Checkpoint, open_checkpoint
from firebox.weights.load import load_weights
from firebox.weights.requantise import Requantiser
from tests.support.experts import relative_error
from tests.support.small_models import write_quantised, write_small

CPU = torch.device("cpu")
PROMPTS = (list(range(5, 26)), [7, 9])  # 21 tokens go to extend, 2 to decode
TOKENS = 3


class Recorded:
    """A scheduler and a runner whose logits are kept: request → rows."""

    def __init__(
        self, checkpoint: Checkpoint, gpu: Gpu, dtype: torch.dtype, requantiser: Requantiser | None = None
    ) -> None:
        build = Build(gpu, CPU, dtype, dtype, 64)
        if gpu.kind == "cuda":
            requantise = requantiser and requantiser.quantise
            build = dataclasses.replace(build, shared=Device(gpu, CPU, 64), requantise=requantise)
        else:
            build = dataclasses.replace(build, moe_backend="torch", attention_backend="torch_reference")
        self.choices = build.choices
        self.model: Any = make_model(checkpoint, build)
        load_weights(self.model, checkpoint, on_filled=requantiser or (lambda slot: None))
        name = {torch.float16: "float16", torch.float32: "float32"}[dtype]
        window = next((s.window_tokens for s in self.model.cache_specs if hasattr(s, "window_tokens")), None)
        sizes = PoolSizes(32, 16, 32 if window else 0)
        caches = allocate_pool(
            self.model.cache_specs, sizes, load("formats.kv", name), CPU, self.model.kv_scales
        )
        self.runner = Runner(self.model, caches, 16, frozenset(), CPU)
        cache = KVCache(CacheSizes(32, 16, window, 32 if window else 0, 0), False)
        self.scheduler = Scheduler(
            cache,
            max_running_requests=8,
            max_batch_tokens=64,
            prefill_chunk_tokens=64,
            eos_token_ids=frozenset(),
        )

    def rows(
        self, prompts: list[list[int]], tokens: int, every: bool
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Logits, step after step, and each request's tokens; `every`: of all rows of the prompts."""
        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, prompt_logprobs=0 if every else None
        )
        requests = [Request(i, list(prompt), params) for i, prompt in enumerate(prompts)]
        kept, call = [], self.model.logits
        self.model.logits = lambda x: kept.append(call(x)) or kept[-1]
        for request in requests:
            self.scheduler.add(request)
        while (plan := self.scheduler.plan()) is not None:
            self.scheduler.apply(plan, self.runner.run(plan))
        self.model.logits = call
        return torch.cat(kept).float(), [request.token_ids for request in requests]


def main(model: str, format: str, requantize: str = "none") -> None:
    assert INTERPRETED, "set TRITON_INTERPRET=1"
    gpu = find_gpu("gb10")
    triton_paged.gpu_of = lambda device: gpu  # the tensors are on a CPU
    folder = write_small(Path(tempfile.mkdtemp()) / "plain", model)
    folder = folder if format == "bf16" else write_quantised(folder, format)
    checkpoint = open_checkpoint(folder)
    in_fp8 = requantize == "fp8"
    stored = Requantiser(0.04, kernels=True) if in_fp8 else None
    device = Recorded(checkpoint, gpu, torch.float16, stored)
    found, known = device.rows([list(prompt) for prompt in PROMPTS], TOKENS, every=False)

    def errors(oracle: Recorded) -> dict[str, float]:
        """`found` has a row a step of each request."""
        wanted = [oracle.rows([ids[:-1]], 1, every=True)[0][-TOKENS:] for ids in known]
        pairs = enumerate(wanted)
        return {f"request {i}": relative_error(found[i :: len(PROMPTS)], rows) for i, rows in pairs}

    of_plain = errors(Recorded(checkpoint, probe_cpu(), torch.float32))
    told = {"ran": sorted({choice.name for choice in device.choices}), "errors": of_plain}
    if stored is not None:
        same = Recorded(checkpoint, probe_cpu(), torch.float32, Requantiser(0.04))
        requantised = [found.module for found in stored.done]
        told |= {"errors": errors(same), "moved": of_plain, "requantised": requantised, "left": stored.left}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
