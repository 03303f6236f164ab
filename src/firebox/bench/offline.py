"""The engine without a server, in this process: decode at every batch and context, prefill, and what a step
consists of. `_offline.py` says what the numbers mean. What is asked for and not measured is listed, with the
reason.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import firebox
from firebox.bench._bandwidth import copy_gb_s, give_back, wait_for
from firebox.bench._offline import FIRST, AnyRow, Decode, NotMeasured, Offline, Prefill, Settings
from firebox.bench._routing import Routing, void
from firebox.bench._step import Profile, experts_looked_at, median, profiled, replay_ms
from firebox.bench.timer import now
from firebox.cache.pool import LayerCache
from firebox.config import GPU_PAGE_TOKENS, Config, EngineConfig
from firebox.engine.messages import Ready, SamplingParams
from firebox.engine.outline import device_of
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.engine.start import start
from firebox.errors import ConfigError
from firebox.hardware.base import Gpu
from firebox.planning._parts import Part, Source, kv_dtype, open_source
from firebox.planning.memory import CacheBytes, cache_bytes
from firebox.planning.roof import matrix_s, weights_bytes
from firebox.weights.checkpoint import Checkpoint, first_layers, open_checkpoint

LOOKED_AT, WARM = 2, 4  # steps before the timed ones: eager, with experts counted; then as they will be timed
LEAD = LOOKED_AT + WARM + 2
PREFILL_RUNS = 3
FILL_PAGES = 256

OnRow = Callable[[AnyRow], None]
"""Called with each row once it is there."""


def measure(settings: Settings, on_row: OnRow = lambda row: None) -> Offline:
    """Loads the engine and measures. Raises what loading raises, and ConfigError for sizes below one."""
    for name in ("batches", "contexts", "prefills"):
        if any(number < 1 for number in getattr(settings, name)):
            raise ConfigError(f"{name} are {list(getattr(settings, name))}", hint="numbers from 1 on")
    began = now()
    checkpoint = _checkpoint(settings.config)
    dtype = settings.config.model.dtype
    gpu, _ = device_of(settings.config.engine.device, checkpoint.dtype if dtype == "auto" else dtype)
    rate_gb_s = copy_gb_s(torch.device(gpu.kind))
    config = dataclasses.replace(settings.config, engine=_engine(settings, checkpoint))
    scheduler, runner, ready = start(config)
    bench = _Bench(settings, config, checkpoint, scheduler, runner, ready, rate_gb_s)
    report = Offline(
        model=settings.name,
        format=bench.format,
        device=ready.device,
        layers=len(runner.model.cache_specs),
        firebox=firebox.__version__,
        torch=str(torch.__version__),
        copy_gb_s=rate_gb_s,
        load_s=now() - began,
        weights_bytes=ready.weights_bytes,
        kv_tokens=ready.kv_pages * ready.page_tokens,
        context_tokens=ready.context_tokens,
        settings=ready.reasons,
    )
    until = None if settings.within_s is None else began + settings.within_s
    for what, row in bench.rows():
        found = _not_in_time(what, settings) if until is not None and now() >= until else _tried(what, row)
        _keep(report, found)
        on_row(found)
        _tried(what, bench.clear)  # on a device that is lost it fails too, as every row after this one will
    report.modes = _modes(runner.steps)
    return report


def _keep(report: Offline, row: AnyRow) -> None:
    if isinstance(row, Decode):
        report.decode.append(row)
    elif isinstance(row, Prefill):
        report.prefill.append(row)
    else:
        report.not_measured.append(row)


def _not_in_time(what: str, settings: Settings) -> NotMeasured:
    return NotMeasured(what, f"its turn did not come within {settings.within_s:g} s")


def _tried(what: str, row: Callable[[], Any]) -> Any:
    """The row, or why there is none: one that fails (memory, a kernel) leaves the others."""
    try:
        return row()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is reported)
        words = (str(error).strip().splitlines() or ["no message"])[0][:300]
        return NotMeasured(what, f"{type(error).__name__}: {words}", failed=True)


def _checkpoint(config: Config) -> Checkpoint:
    checkpoint = open_checkpoint(Path(config.model.model))
    layers = config.model.layers
    return checkpoint if layers is None else first_layers(checkpoint, layers)


def _engine(settings: Settings, checkpoint: Checkpoint) -> EngineConfig:
    engine, most = settings.config.engine, max(settings.batches, default=1)
    longest = max((_reached(settings, context, most) for context in settings.contexts), default=0)
    longest = max(longest, max((0, *settings.prefills)) + 2)
    longest += -longest % (engine.page_tokens or GPU_PAGE_TOKENS)
    made_for = int(checkpoint.text_config["max_position_embeddings"])
    return dataclasses.replace(
        engine,
        max_running_requests=most,
        max_batch_tokens=max(engine.max_batch_tokens, most),
        context_length=engine.context_length or min(longest, made_for),
        prefix_cache=False,
    )


def _reached(settings: Settings, context: int, batch: int) -> int:
    """The most tokens that a request of a row comes to. Where prompts are run, the first one's goes on while
    the others' run: a token for each step they take."""
    engine, others = settings.config.engine, 0
    if not settings.granted:
        others = -(-batch * context // max(1, engine.max_batch_tokens - batch))
        others += -(-context // engine.prefill_chunk_tokens)
    return context + others + settings.tokens + LEAD


def _modes(steps: Counter[tuple[str, str]]) -> dict[str, int]:
    return {"/".join(mode): count for mode, count in steps.items() if count}


def source_of(name: str, config: Config, checkpoint: Checkpoint, dtype: str, gpu: Gpu) -> Source:
    """What planning needs of the loaded model. A CPU's requantised weights are as wide as before."""
    stored = frozenset(checkpoint.names()) if checkpoint.shards else None
    in_fp8 = config.model.requantize == "fp8" and gpu.kind == "cuda"
    return Source(name, checkpoint.model_type, checkpoint.text_config, dtype, stored, in_fp8)


class _Bench:
    """One loaded engine."""

    def __init__(
        self, settings: Settings, config: Config, checkpoint: Checkpoint, scheduler: Scheduler,
        runner: Runner, ready: Ready, rate_gb_s: float,
    ) -> None:  # fmt: skip
        self.settings, self.scheduler, self.runner, self.ready = settings, scheduler, runner, ready
        self.rate_gb_s = rate_gb_s
        self.gpu, _ = device_of(config.engine.device, ready.dtype)
        source = source_of(settings.name, config, checkpoint, ready.dtype, self.gpu)
        self.device = torch.device(self.gpu.kind)
        self.parts: Sequence[Part] = open_source(source, self.gpu).parts
        itemsize = kv_dtype(source, config.engine.kv_cache_dtype).itemsize
        self.cache: CacheBytes = cache_bytes(runner.model.cache_specs, itemsize, 1)
        self.format = _format(self.parts)
        self.routing = _routing(self.parts)
        self.invented = config.model.load_format == "dummy"
        self._requests: list[Request] = []
        self._filled = False

    def rows(self) -> Iterator[tuple[str, Callable[[], AnyRow]]]:
        """What there is to measure, in this order: the shortest context, prompts, the longer contexts."""
        contexts = list(self.settings.contexts)
        yield from self._decodes(contexts[:1])
        for tokens in self.settings.prefills:
            yield f"prefill {tokens}", partial(self.prefill, tokens)
        yield from self._decodes(contexts[1:])

    def _decodes(self, contexts: Sequence[int]) -> Iterator[tuple[str, Callable[[], AnyRow]]]:
        for context in contexts:
            for batch in self.settings.batches:
                what = f"decode context {context} batch {batch}"
                yield what, partial(self.decode, context, batch)

    # ---- decode

    def decode(self, context: int, batch: int) -> Decode | NotMeasured:
        """One row, or why there is none."""
        refusal = self._refusal(context, batch)
        if refusal is not None:
            return NotMeasured(f"decode context {context} batch {batch}", refusal)
        pipeline = Pipeline(self.scheduler, self.runner)
        if self.settings.granted:
            self._seat(context, batch)
        else:
            self._compute(context, batch, pipeline)
        seen = self._experts_seen(pipeline, batch)
        for _ in range(WARM):
            pipeline.step()
        before = Counter(self.runner.steps)
        steps_s = self._timed(pipeline, batch)
        ms = median(steps_s) * 1e3
        modes = _modes(self.runner.steps - before)
        graph = self.runner.captured(batch)
        alone, profile = None, None
        if graph is None:
            profile = profiled(pipeline.step, self.device) if self.settings.profile else None
        self._end(pipeline)
        if graph is not None:
            alone = replay_ms(graph, self.device)
            profile = profiled(graph.replay, self.device) if self.settings.profile else None
        weights, kept = round(weights_bytes(self.parts, 1, batch)), batch * self._cache_bytes(context)
        roof_ms = (weights + kept) / self.rate_gb_s / 1e6
        return Decode(
            model=self.settings.name,
            format=self.format,
            context=context,
            batch=batch,
            kv="granted" if self.settings.granted else "computed",
            ms_per_token=ms,
            first_ms_per_token=median(steps_s[:FIRST]) * 1e3,
            tokens_per_s=batch / ms * 1e3,
            roof_ms=roof_ms,
            share_of_roof=roof_ms / ms,
            weights_bytes=weights,
            cache_bytes=kept,
            replay_ms=alone,
            host_ms=None if alone is None else ms - alone,
            experts=sum(seen) / len(seen) if seen else None,
            experts_expected=self.routing.expected(batch) if seen and self.routing else None,
            void=self._void(seen, batch),
            steps=self.settings.tokens,
            modes=modes,
            profile=profile,
        )

    def _refusal(self, context: int, batch: int) -> str | None:
        """Why the pool does not hold this row, with the numbers."""
        tokens = _reached(self.settings, context, batch)
        if tokens > self.ready.context_tokens:
            return f"{tokens} tokens a request; the engine's context holds {self.ready.context_tokens}"
        page_tokens, pages = self.ready.page_tokens, batch * -(-tokens // self.ready.page_tokens)
        if pages > self.ready.kv_pages:
            held = self.ready.kv_pages * page_tokens
            return f"{batch} requests need {pages * page_tokens} tokens of KV cache; the pool holds {held}"
        return None

    def _request(self, known: int, *, random: bool, output: int | None = None) -> Request:
        """A new one with a prompt of `known` tokens, for so many or as many tokens as its context holds;
        unless `random`, only the prompt's last is: the others are not read."""
        number = len(self._requests) + 1
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(5, self.ready.vocab_size, (known if random else 1,), generator=generator).tolist()
        most = self.ready.context_tokens - known
        params = SamplingParams(max_tokens=output or most, temperature=0.0, ignore_eos=True)
        request = Request(number, [0] * (known - len(ids)) + ids, params)
        self._requests.append(request)
        return request

    def _seat(self, context: int, batch: int) -> None:
        """Requests that know so many tokens, less the steps before the timed ones."""
        self._fill()
        known = max(1, context - LEAD)
        for _ in range(batch):
            seated = self.scheduler.seat(self._request(known, random=False), known - 1)
            assert seated, (batch, context, "pages were counted before")

    def _compute(self, context: int, batch: int, pipeline: Pipeline) -> None:
        """The same, their prompts run."""
        requests = [self._request(max(1, context - LEAD), random=True) for _ in range(batch)]
        for request in requests:
            self.scheduler.add(request)
        while any(request.output_tokens == 0 for request in requests):
            pipeline.step()

    def _fill(self) -> None:
        """Normally distributed keys and values in all pages, once. Zeros would take less power, and so less
        time."""
        if self._filled:
            return
        self._filled = True
        for cache in self.runner.caches:
            if isinstance(cache, LayerCache):
                for k, v in zip(cache.k.split(FILL_PAGES), cache.v.split(FILL_PAGES), strict=True):
                    for rows in (k, v):
                        rows.copy_(cache.format.encode(torch.randn(rows.shape, device=rows.device), 1.0))

    def _experts_seen(self, pipeline: Pipeline, batch: int) -> list[int]:
        """Distinct experts of each layer in a few eager steps; none where nobody can look, on a CPU or
        without expert layers."""
        if self.device.type != "cuda":
            return []
        with self.runner.eagerly("looked at"), experts_looked_at(batch) as seen:
            for _ in range(LOOKED_AT):
                pipeline.step()
        return seen

    def _void(self, seen: Sequence[int], batch: int) -> str | None:
        """Why a row's time does not count. A checkpoint's own routers choose as they have learned."""
        if not seen or self.routing is None or not self.invented:
            return None
        return void(self.routing, batch, seen)

    def _timed(self, pipeline: Pipeline, batch: int) -> list[float]:
        """Seconds of each step that gave every request its token."""
        seconds, before = [], now()
        for _ in range(self.settings.tokens):
            done = pipeline.step()
            ended = now()
            assert done is not None and len(done[1]) == batch, "a request was left out of a step"
            seconds.append(ended - before)
            before = ended
        return seconds

    def _cache_bytes(self, context: int) -> int:
        in_window = min(context, self.cache.window_tokens) * self.cache.per_window_token
        return context * self.cache.per_token + in_window + 2 * self.cache.state

    # ---- prefill

    def prefill(self, tokens: int) -> Prefill | NotMeasured:
        """One row, or why there is none."""
        if tokens + 1 > self.ready.context_tokens:
            why = f"the engine's context holds {self.ready.context_tokens} tokens"
            return NotMeasured(f"prefill {tokens}", why)
        ms = [self._first_token_ms(tokens) for _ in range(1 + PREFILL_RUNS)][1:]
        middle = median(ms)
        roof_ms, roof = self._prefill_roof(tokens)
        return Prefill(
            model=self.settings.name,
            format=self.format,
            tokens=tokens,
            ttft_ms=middle,
            tokens_per_s=tokens / middle * 1e3,
            roof_ms=roof_ms,
            roof=roof,
            share_of_roof=roof_ms / middle,
            runs_ms=ms,
            profile=self._profile_of_prompt(tokens) if self.settings.profile else None,
        )

    def _first_token_ms(self, tokens: int) -> float:
        request, pipeline = self._request(tokens, random=True), Pipeline(self.scheduler, self.runner)
        wait_for(self.device)
        began = now()
        self.scheduler.add(request)
        while request.output_tokens == 0:
            pipeline.step()
        ended = now()
        self._end(pipeline)
        return (ended - began) * 1e3

    def _profile_of_prompt(self, tokens: int) -> Profile | None:
        """Of its steps alone: a request that wants no second token makes none of decode."""
        pipeline = Pipeline(self.scheduler, self.runner)

        def run() -> None:
            self.scheduler.add(self._request(tokens, random=True, output=1))
            while pipeline.has_work:
                pipeline.step()

        return profiled(run, self.device)

    def _prefill_roof(self, tokens: int) -> tuple[float, str]:
        seconds = matrix_s(self.parts, self.gpu)
        if seconds is not None:
            return tokens * seconds * 1e3, "matrix units, datasheet rate, without attention"
        return weights_bytes(self.parts, 1, tokens) / self.rate_gb_s / 1e6, "weights read once, copy rate"

    # ---- afterwards

    def _end(self, pipeline: Pipeline) -> None:
        """Nobody is left, and no step is on its way."""
        self._abort_all()
        while pipeline.has_work:
            pipeline.step()
        wait_for(self.device)

    def _abort_all(self) -> None:
        for request in self._requests:
            self.scheduler.abort(request.request_id)

    def clear(self) -> None:
        """Nobody is left, also after a row that failed."""
        self._abort_all()
        give_back(self.device)


def _routing(parts: Sequence[Part]) -> Routing | None:
    """Of the model's expert layers, which are alike in this."""
    for part in parts:
        if part.block is not None and part.read:
            return Routing(part.block.problem.experts, part.block.problem.top_k)
    return None


def _format(parts: Sequence[Part]) -> str:
    """How most bytes of the weights are stored."""
    sizes = Counter[str]()
    for part in parts:
        for slot, count in part.slots:
            if part.read:
                name = getattr(getattr(slot, "format", None), "name", "bf16")
                sizes[name] += count * slot.target.nbytes
    return max(sizes, key=lambda name: sizes[name], default="")
