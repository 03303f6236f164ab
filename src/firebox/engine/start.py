"""From a config to a loaded engine: checkpoint, derived settings, model, weights, cache, warm-up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from msgspec import structs

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.cache.pool import PoolSizes, allocate_pool
from firebox.cache.specs import CacheSpec, RecurrentSpec
from firebox.config import Config, EngineConfig, ModelConfig, check_choice
from firebox.engine.budget import Resolved, resolve
from firebox.engine.launch_plan import compile_plan
from firebox.engine.launch_plan import summary as plan_summary
from firebox.engine.ledger import launch_rows, ledger_rows, refuse_fallbacks, refuse_untuned
from firebox.engine.memory import Meter
from firebox.engine.messages import Ready, SamplingParams
from firebox.engine.outline import (
    build_of,
    device_of,
    facts,
    kv_module,
    make_model,
    make_outline,
    requantiser_of,
)
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.errors import ConfigError
from firebox.formats.kv.base import NO_SCALES
from firebox.hardware.base import Gpu
from firebox.kernels._cpu import set_threads
from firebox.layers.base import Build
from firebox.layers.decoder import Decoder
from firebox.models.base import Model, decode_bytes
from firebox.weights.checkpoint import Checkpoint, first_layers, open_checkpoint
from firebox.weights.dummy import load_dummy
from firebox.weights.load import load_weights
from firebox.weights.requantise import Requantiser, stored_bytes

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.layers.launches import Launch

log = logging.getLogger(__name__)


def start(
    config: Config, on_progress: Callable[[int, int], None] = lambda loaded, total: None
) -> tuple[Scheduler, Runner, Ready]:
    """Loads everything; `config.model.model` is a folder. Raises the FireboxError that says what is wrong."""
    began = time.perf_counter()
    checkpoint = open_checkpoint(Path(config.model.model))
    if config.model.layers is not None:
        if config.model.load_format != "dummy":
            raise ConfigError("--layers is for made-up weights", hint="--load-format dummy --layers N")
        checkpoint = first_layers(checkpoint, config.model.layers)
    dtype = checkpoint.dtype if config.model.dtype == "auto" else config.model.dtype
    gpu, why = device_of(config.engine.device, dtype)
    check_choice(EngineConfig, "self_test", config.engine.self_test)
    outline = make_outline(checkpoint, config, gpu)
    found = facts(checkpoint, config, gpu, outline)
    settings = resolve(config.engine, config.model.dtype, found, gpu)
    rows = ledger_rows(outline.choices, settings.max_batch_tokens, settings.dtype)
    if config.engine.strict:
        refuse_fallbacks(rows)
    launches, planned = (
        _launches(outline.model, settings, gpu, config.engine) if gpu.kind == "cuda" else ((), [])
    )
    torch.set_num_threads(settings.threads)
    set_threads(settings.threads)

    requantiser = requantiser_of(config.model, gpu)
    context, threads = settings.context_tokens, settings.threads
    build = build_of(config, settings.dtype, settings.kv_format, context, gpu, threads, requantiser)
    meter = Meter(gpu)
    model = make_model(checkpoint, build)
    loaded = _load(model, checkpoint, config.model, requantiser, on_progress)
    meter.took("weights", peak="loader peak")
    runner = _make_runner(model, checkpoint, settings, config.engine, build)
    meter.took("KV pages")
    window_tokens = found.window_tokens
    fresh = make_scheduler(settings, window_tokens, prefix_cache=False, eos_token_ids=frozenset())
    warm_up(runner, fresh, settings if gpu.kind == "cuda" else None)
    meter.took("graphs", peak="workspace")
    _ascribe(meter, build, runner)
    scheduler = make_scheduler(settings, window_tokens, config.engine.prefix_cache, checkpoint.eos_token_ids)
    ready = Ready(
        model_type=checkpoint.model_type,
        device=gpu.name,
        dtype=settings.dtype,
        vocab_size=_vocab(checkpoint),
        context_tokens=settings.context_tokens,
        max_running_requests=settings.max_running_requests,
        kv_pages=settings.kv_pages,
        page_tokens=settings.page_tokens,
        weights_bytes=found.weights_bytes,
        kv_bytes_per_token=found.kv_bytes_per_token,
        eos_token_ids=sorted(checkpoint.eos_token_ids),
        ledger=[*rows, *launch_rows(launches, runner.graph_rows)],
        reasons=[
            f"device {gpu.name}: {why}",
            *settings.reasons,
            *planned,
            *loaded,
            *_scales(model, settings.kv_format),
        ],
        load_seconds=time.perf_counter() - began,
        captured=runner.news(),
        memory=meter.beside(settings, f"{runner.graphs} captured so far" if runner.graph_rows else ""),
    )
    return scheduler, runner, ready


def _make_runner(
    model: Model, checkpoint: Checkpoint, settings: Resolved, engine: EngineConfig, build: Build
) -> Runner:
    """With its caches, for the device that the model was built on."""
    sizes = PoolSizes(settings.kv_pages, settings.page_tokens, settings.window_pages, settings.states)
    kv = kv_module(settings.kv_format)
    caches = allocate_pool(model.cache_specs, sizes, kv, build.device, model.kv_scales)
    common = (model, caches, settings.page_tokens, checkpoint.eos_token_ids, build.device)
    if build.gpu.kind != "cuda":
        return Runner(*common)
    from firebox.engine.gpu_runner import GpuRunner

    return GpuRunner(
        *common,
        build.gpu,
        context_tokens=settings.context_tokens,
        vocab=_vocab(checkpoint),
        max_rows=settings.max_running_requests,
        graphs=engine.cuda_graph,
        overlap=engine.overlap,
        strict=engine.strict,
    )


def _ascribe(meter: Meter, build: Build, runner: Runner) -> None:
    """What was taken together with something else."""
    if build.shared is not None:
        meter.moves(build.shared.workspace_bytes, "weights", "workspace")
    for what, size in runner.kept_bytes().items():
        if what != "KV pages":
            meter.moves(size, "KV pages", what)


def _vocab(checkpoint: Checkpoint) -> int:
    return int(checkpoint.text_config["vocab_size"])


def _launches(
    model: Decoder, settings: Resolved, gpu: Gpu, engine: EngineConfig
) -> tuple[tuple[Launch, ...], list[str]]:
    """The launch plan of a model on the meta device, compiled and tested, and what is to be said of that.
    Raises ConfigError, LaunchRefused."""
    from firebox.engine.self_test import self_test
    from firebox.engine.trials import Setup
    from firebox.kernels.plan import Planned, Setting

    kv = kv_module(settings.kv_format).DTYPE
    setting = Setting(gpu, kv_dtype=kv, page_tokens=settings.page_tokens)
    tokens, strict = settings.max_batch_tokens, engine.strict
    found: list[tuple[Launch, ...]] = []
    replaced: list[str] = []
    if strict:
        refuse_untuned(model, setting, tokens)

    def plan() -> list[Planned]:
        compiled, others = compile_plan(model, setting, tokens, strict=strict)
        found.append(compiled)
        replaced.extend(others)
        return [launch.planned for launch in found[-1]]

    setup = Setup(gpu, torch.device(gpu.kind), tokens)
    tested = list(self_test(plan, setup, mode=engine.self_test, strict=strict))
    if not found:
        plan()
    return found[-1], [plan_summary(found[-1]), *replaced, *tested]


def _load(
    model: Model,
    checkpoint: Checkpoint,
    config: ModelConfig,
    requantiser: Requantiser | None,
    on_progress: Callable[[int, int], None],
) -> list[str]:
    """Fills the model; what --requantize did, in lines of text."""
    on_filled = requantiser or (lambda slot: None)
    assert isinstance(model, Decoder)
    counts = (stored_bytes, requantiser.kept_bytes) if requantiser else ()
    read_bytes = [decode_bytes(model, count) for count in counts]
    if config.load_format == "dummy":
        load_dummy(model, on_filled=on_filled)
    else:
        load_weights(model, checkpoint, on_progress, on_filled)
    summary = requantiser.summary(*read_bytes) if requantiser else []
    for line in summary:
        log.info("%s", line)
    return summary


def _scales(model: Model, kv_format: str) -> list[str]:
    """Which scales an FP8 cache has, in a line of text."""
    if not kv_module(kv_format).SCALED:
        return []
    kept = [pair for spec, pair in zip(model.cache_specs, model.kv_scales, strict=True) if _keeps_rows(spec)]
    found = [scale for pair in kept if pair != NO_SCALES for scale in pair]
    if not found:
        return [f"kv_scales 1.0 in all {len(kept)} layers: the checkpoint has no others"]
    other = sum(pair != NO_SCALES for pair in kept)
    return [
        f"kv_scales {min(found):.4g} to {max(found):.4g} in {other} of {len(kept)} layers: the checkpoint's; "
        "1.0 in the rest"
    ]


def _keeps_rows(spec: CacheSpec | None) -> bool:
    return spec is not None and not isinstance(spec, RecurrentSpec)


def make_scheduler(
    settings: Resolved, window_tokens: int | None, prefix_cache: bool, eos_token_ids: frozenset[int]
) -> Scheduler:
    """A scheduler over an empty cache of the settings' size."""
    sizes = CacheSizes(
        settings.kv_pages, settings.page_tokens, window_tokens, settings.window_pages, settings.states
    )
    return Scheduler(
        KVCache(sizes, prefix_cache),
        max_running_requests=settings.max_running_requests,
        max_batch_tokens=settings.max_batch_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        eos_token_ids=eos_token_ids,
    )


def warm_up(runner: Runner, scheduler: Scheduler, settings: Resolved | None = None) -> None:
    """Runs one prompt and one decode step, so that no request waits for a kernel to be compiled or read from
    disk; with `settings` then a step of as many tokens as one may have, as far as the pages go, so that its
    memory is seen."""
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    _run_all(runner, scheduler, [Request(-1, [0, 0, 0], params)])
    if settings is not None:
        chunk = min(settings.prefill_chunk_tokens, settings.context_tokens - 1)
        count = min(settings.max_batch_tokens // chunk, settings.max_running_requests)
        params = structs.replace(params, max_tokens=1)
        _run_all(runner, scheduler, [Request(-2 - i, [0] * chunk, params) for i in range(count)])
    runner.steps.clear()  # counted are steps for users


def _run_all(runner: Runner, scheduler: Scheduler, requests: Sequence[Request]) -> None:
    for request in requests:
        scheduler.add(request)
    while (plan := scheduler.plan()) is not None:
        scheduler.apply(plan, runner.run(plan))
