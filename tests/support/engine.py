"""An engine inside the test's own process: real scheduler, runner and model, no sockets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.budget import Resolved, resolve
from firebox.engine.messages import Delta, SamplingParams
from firebox.engine.outline import facts
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.scheduler import Scheduler
from firebox.engine.start import make_scheduler, start
from firebox.hardware.probe import probe_cpu
from firebox.weights.checkpoint import open_checkpoint

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


class InProcessEngine:
    """Submits requests and runs them to the end. Keyword arguments are EngineConfig's, plus `dtype` and
    ModelConfig's `load_format`, `requantize` and `requantize_limit`."""

    def __init__(
        self,
        folder: Path | str,
        dtype: str = "auto",
        load_format: str = "auto",
        requantize: str = "none",
        requantize_limit: float = 0.04,
        **settings: object,
    ) -> None:
        settings = {"threads": 1, "kv_pages": 256, "max_running_requests": 64, "self_test": "off"} | settings
        engine = dataclasses.replace(EngineConfig(), **settings)  # type: ignore[arg-type]
        model = ModelConfig(
            model=str(folder),
            dtype=dtype,
            load_format=load_format,
            requantize=requantize,
            requantize_limit=requantize_limit,
        )
        self._config = Config(model=model, engine=engine)
        scheduler, self.runner, self.ready = start(self._config)
        self.scheduler = scheduler
        self._next_id = 0

    @property
    def scheduler(self) -> Scheduler:
        """A test may put another in its place."""
        return self._pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler) -> None:
        self._pipeline = Pipeline(scheduler, self.runner)

    def restart(self, prefill_chunk_tokens: int) -> None:
        """A new scheduler with an empty cache and this prefill chunk, over the same model and pages."""
        settings, window_tokens = self._settings
        settings = dataclasses.replace(settings, prefill_chunk_tokens=prefill_chunk_tokens)
        eos_token_ids = frozenset(self.ready.eos_token_ids)
        self.scheduler = make_scheduler(settings, window_tokens, True, eos_token_ids)

    @functools.cached_property
    def _settings(self) -> tuple[Resolved, int | None]:
        """What `start` derived from the config, and the model's window."""
        gpu = probe_cpu()
        found = facts(open_checkpoint(Path(self._config.model.model)), self._config, gpu)
        settings = resolve(self._config.engine, self._config.model.dtype, found, gpu)
        assert settings.kv_pages == self.ready.kv_pages, (settings.kv_pages, self.ready.kv_pages)
        return settings, found.window_tokens

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams = GREEDY) -> int:
        """Queues a request; its id."""
        self._next_id += 1
        self.scheduler.add(Request(self._next_id, list(prompt_ids), params))
        return self._next_id

    def step(self) -> list[Delta]:
        """One step of the engine; nothing when there is nothing to do."""
        done = self._pipeline.step()
        return [] if done is None else done[1]

    def deltas(self) -> dict[int, list[Delta]]:
        """Runs until nothing is left; the deltas of each request."""
        found: dict[int, list[Delta]] = {}
        while self._pipeline.has_work:
            for delta in self.step():
                found.setdefault(delta.request_id, []).append(delta)
        return found

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams] = GREEDY
    ) -> list[list[int]]:
        """The output ids of prompts that run together; `params`: of all, or of each."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        request_ids = [self.submit(*pair) for pair in zip(prompts, each, strict=True)]
        found = self.deltas()
        return [[token_id for delta in found[i] for token_id in delta.ids] for i in request_ids]
