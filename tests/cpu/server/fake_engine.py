"""An engine without a model: it has AsyncEngine's interface and answers with the ids that `reply` says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from firebox.engine.client import (
    AsyncEngine,
    Delta,
    Ready,
    RequestStream,
    SamplingParams,
    Stats,
    TokenLogprobs,
)
from firebox.engine.messages import Abort, Captured, Generate, ToEngine
from firebox.errors import EngineDied

EOS = 0
Reply = Callable[[list[int], SamplingParams], Iterable[int]]


def ready(**changed: object) -> Ready:
    """What an engine with small limits says of itself."""
    fields = dict(
        model_type="fake",
        device="cpu",
        dtype="float32",
        vocab_size=3072,
        context_tokens=256,
        max_running_requests=4,
        kv_pages=64,
        page_tokens=16,
        weights_bytes=0,
        kv_bytes_per_token=0,
        eos_token_ids=[EOS],
        ledger=[],
        reasons=["fake"],
        load_seconds=0.0,
    )
    return Ready(**{**fields, **changed})  # type: ignore[arg-type]


def logprobs_of(token_id: int, count: int) -> TokenLogprobs:
    """Made-up logprobs that tell tokens apart: the token itself is the most likely, its successors follow."""
    top = [token_id + step for step in range(count)]
    return TokenLogprobs(
        token_id, -token_id / 4096, 0, top, [-(token_id + 4096 * step) / 4096 for step in range(count)]
    )


class FakeEngine(AsyncEngine):
    """AsyncEngine with the two sockets and the process replaced by tasks of the same loop.

    `step_s`: time between an answer's deltas; `step_tokens`: ids in each; None for `reply` never answers.
    """

    def __init__(
        self,
        reply: Reply | None,
        *,
        step_s: float = 0.0,
        step_tokens: int = 1,
        max_queued: int = 4,
        **changed: object,
    ) -> None:
        self.stats = Stats(kv_pages_total=64, kv_pages_free=64)
        self.captured: dict[int, Captured] = {}
        self.ready = ready(**changed)
        self.died = None
        self.on_death = lambda: None
        self.generated: list[Generate] = []
        self.aborted: list[int] = []
        self._max_queued_requests = max_queued
        self._streams: dict[int, RequestStream] = {}
        self._next_id = 0
        self._reply, self._step_s, self._step_tokens = reply, step_s, step_tokens
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def die(self) -> None:
        """What the watcher does when the process has ended."""
        for task in self._tasks.values():
            task.cancel()
        self.died = EngineDied("the engine process ended with status -9")
        for stream in self._streams.values():
            stream._arrived.set()
        self.on_death()

    def stop(self) -> int:
        return 0

    def _send(self, message: ToEngine) -> None:
        if isinstance(message, Generate):
            self.generated.append(message)
            self._tasks[message.request_id] = asyncio.get_running_loop().create_task(self._run(message))
        elif isinstance(message, Abort):
            self.aborted += message.request_ids
            for request_id in message.request_ids:
                self._tasks[request_id].cancel()

    async def _run(self, request: Generate) -> None:
        stream = self._streams[request.request_id]
        if self._reply is None:
            return
        params = request.params
        for delta in _deltas(request, list(self._reply(request.prompt_ids, params)), self._step_tokens):
            await asyncio.sleep(self._step_s)
            if delta.finish_reason is not None:
                self._streams.pop(request.request_id, None)
            stream._put(delta)


def _deltas(request: Generate, script: list[int], step_tokens: int) -> list[Delta]:
    params = request.params
    assert params.max_tokens is not None
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    ids, stop = [], None
    for token_id in script[: params.max_tokens]:
        ids.append(token_id)
        if token_id in stops and len(ids) > params.min_tokens:
            stop = token_id
            break
    prompt_logprobs = None
    if params.prompt_logprobs is not None:
        prompt_logprobs = [None, *(logprobs_of(id, params.prompt_logprobs) for id in request.prompt_ids[1:])]
    steps = [ids[at : at + step_tokens] for at in range(0, len(ids), step_tokens)] or [[]]
    deltas = [
        Delta(
            request.request_id,
            step,
            cached_tokens=len(request.prompt_ids) // 2 if index == 0 else None,
            logprobs=None if params.logprobs is None else [logprobs_of(id, params.logprobs) for id in step],
            prompt_logprobs=prompt_logprobs if index == 0 else None,
        )
        for index, step in enumerate(steps)
    ]
    reason = "length" if stop is None else "stop"
    deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason=reason, stop_token_id=stop)
    return deltas
