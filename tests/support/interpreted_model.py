"""Runs a small model as a GPU does, layer for layer and launch for launch, but on the CPU under Triton's
interpreter in float16, and prints as JSON how far its logits are from those of torch operators in float32.
With "fp8" as in --requantize: from those of the same FP8 weights (`errors`), and of the checkpoint's
(`moved`).

    TRITON_INTERPRET=1 python -m tests.support.interpreted_model MODEL CHECKPOINT [graphs|fp8]

MODEL: as its file is called, of which the checkpoint is a small one (see small_models.py). "graphs": decode
steps through the runner of a GPU, see replayed.py, with a prefix cache.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from firebox.attention import triton_paged
from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cache.pool import PoolSizes, StateCache, allocate_pool
from firebox.cache.specs import RecurrentSpec
from firebox.engine.messages import SamplingParams
from firebox.engine.outline import make_model
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.find import load
from firebox.hardware.base import Gpu, find_gpu
from firebox.hardware.probe import probe_cpu
from firebox.layers.base import Build
from firebox.layers.device import Device
from firebox.weights.checkpoint import Checkpoint, open_checkpoint
from firebox.weights.load import load_weights
from firebox.weights.requantise import Requantiser
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.replayed import Replayed, replayed_runner

CPU = torch.device("cpu")
PROMPTS = (list(range(5, 26)), [7, 9])  # 21 tokens go to extend, 2 to decode
# For latent and recurrent layers a chunk of whole pages, then the others beside a token of the second
# request's answer.
CHUNKED = {
    "deepseek_v3": (32, (list(range(5, 55)), list(range(70, 83)))),
    "qwen3_5_moe": (16, (list(range(5, 31)), list(range(70, 83)))),
}
TOKENS, GRAPH_TOKENS = 3, 5  # 13 and 3 fill a page, in a step that the next does not wait for
STATES = 8


class Recorded:
    """A scheduler and a runner whose logits are kept: request → rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        gpu: Gpu,
        dtype: torch.dtype,
        chunk_tokens: int = 64,
        graphs: bool = False,
        requantiser: Requantiser | None = None,
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
        states = STATES if any(isinstance(s, RecurrentSpec) for s in self.model.cache_specs) else 0
        sizes = PoolSizes(32, 16, 32 if window else 0, states)
        caches = allocate_pool(
            self.model.cache_specs, sizes, load("formats.kv", name), CPU, self.model.kv_scales
        )
        self.caches = caches
        self.runner = (
            replayed_runner(self.model, caches, 16, gpu, self.model.head.vocab)
            if graphs
            else Runner(self.model, caches, 16, frozenset(), CPU)
        )
        cache = KVCache(CacheSizes(32, 16, window, 32 if window else 0, states), graphs)
        self.scheduler = Scheduler(
            cache,
            max_running_requests=8,
            max_batch_tokens=64,
            prefill_chunk_tokens=chunk_tokens,
            eos_token_ids=frozenset(),
        )

    def rows(
        self, prompts: list[list[int]], tokens: int, every: bool
    ) -> tuple[list[torch.Tensor], list[list[int]]]:
        """Each request's logits and tokens; `every`: of all rows of the prompts."""
        params = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, prompt_logprobs=0 if every else None
        )
        requests = [Request(i, list(prompt), params) for i, prompt in enumerate(prompts)]
        kept: list[list[torch.Tensor]] = [[] for _ in requests]
        last, call = Replayed.replays, self.model.logits
        last.clear()

        def seen(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            logits: torch.Tensor = call(x, out)
            if not Replayed.inside:
                last.append(logits)
            return logits

        self.model.logits = seen
        for request in requests:
            self.scheduler.add(request)
        pipeline = Pipeline(self.scheduler, self.runner)
        while (done := pipeline.step()) is not None:
            sampling = [chunk.request.request_id for chunk in done[0].chunks if chunk.samples]
            if every:
                kept[0] += last
                last.clear()
            elif sampling:  # behind it there may be those of a step that was launched ahead
                for request_id, row in zip(sampling, last.pop(0).unsqueeze(1), strict=True):
                    kept[request_id].append(row)
        self.model.logits = call
        return [torch.cat(rows).float() for rows in kept], [request.token_ids for request in requests]


def main(model: str, folder: str, option: str = "") -> None:
    quick_interpreter.begin()
    gpu = find_gpu("gb10")
    triton_paged.gpu_of = lambda device: gpu  # the tensors are on a CPU
    checkpoint = open_checkpoint(Path(folder))
    graphs, (chunk_tokens, prompts) = option == "graphs", CHUNKED.get(model, (64, PROMPTS))
    stored = Requantiser(0.04, kernels=True) if option == "fp8" else None
    device = Recorded(checkpoint, gpu, torch.float16, chunk_tokens, graphs, stored)
    tokens = GRAPH_TOKENS if graphs else TOKENS
    if graphs:  # and then each request's text goes on, behind what the prefix tree kept of it
        device.scheduler.cache.state_allocator.allocate(2)  # slots are no rows
        _, known = device.rows(prompts, tokens, every=False)
        prompts = [[*ids, 3, 4] for ids in known]
    rows, known = device.rows(prompts, tokens, every=False)

    def errors(oracle: Recorded) -> dict[str, float]:
        wanted = [oracle.rows([ids[:-1]], 1, every=True)[0][0][-tokens:] for ids in known]
        return {f"request {i}": relative_error(rows[i], row) for i, row in enumerate(wanted)}

    of_plain = errors(Recorded(checkpoint, probe_cpu(), torch.float32))
    ran, steps = {choice.name for choice in device.choices}, device.runner.steps
    found: dict[str, Any] = {"errors": of_plain, "ran": sorted(ran)}
    found["steps"] = {mode: n for (mode, _), n in steps.items()}
    found["ahead"] = getattr(device.runner, "ahead", 0)
    stores = [cache for cache in device.caches if isinstance(cache, StateCache)]
    found["slot 0 is zero"] = not any(store.conv[0].any() or store.matrix[0].any() for store in stores)
    found["cached"] = device.scheduler.stats().cached_prompt_tokens
    if stored is not None:
        same = Recorded(checkpoint, probe_cpu(), torch.float32, requantiser=Requantiser(0.04))
        found |= {"errors": errors(same), "moved": of_plain, "left": stored.left}
        found["requantised"] = [one.module for one in stored.done]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
