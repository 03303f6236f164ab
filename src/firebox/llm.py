"""The offline API, in the shape that users of vLLM know.

    with LLM("firebox-tiny") as llm:
        [answer] = llm.generate("def fibonacci(", SamplingParams(temperature=0, max_tokens=64))
        print(answer.outputs[0].text)

The calls block. The event loop behind them has its own thread, so they work inside another loop (a notebook)
too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from firebox.answer import Answer, SamplingParams, TextEngine, aborting, load_text
from firebox.answer.progress import counting, loading
from firebox.config import DEFAULT_MODEL, Config, EngineConfig, ModelConfig
from firebox.engine.client import AsyncEngine, EngineProcess, TokenLogprobs
from firebox.errors import ConfigError, EngineDied
from firebox.text.folder import resolve_folder
from firebox.text.templates import Message
from firebox.text.tokenizer import Tokenizer

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "TokensPrompt"]

UNLIMITED = 2**31  # offline, every prompt may wait
T = TypeVar("T")


class TokensPrompt(TypedDict):
    """A prompt that is already ids."""

    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


@dataclass(frozen=True)
class Logprob:
    """One candidate for a position. `rank`: 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `logprobs`: for each token, candidates by id; None unless asked for. `token_ids` include
    the stop token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class RequestOutput:
    """The `n` answers to one prompt. `prompt` is None where ids were given; `prompt_logprobs[0]` is None."""

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    num_cached_tokens: int


class LLM:
    """A model in an engine process of its own. `settings`: fields of ModelConfig and EngineConfig.

    Raises ConfigError for an unknown setting, CheckpointError for a model that cannot be read, OutOfMemory.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, progress: bool = False, **settings: Any) -> None:
        config = _config(model, settings)
        process = EngineProcess.start(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="firebox-llm", daemon=True)
        self._thread.start()
        try:
            self._text = self._wait(_connect(process, Path(config.model.model), Path(model).name, progress))
        except BaseException:
            _close(self._loop, self._thread, process.stop)
            raise
        self._finalizer = weakref.finalize(self, _close, self._loop, self._thread, self._text.engine.stop)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine process. Harmless twice; also done when the object or the interpreter goes away."""
        self._finalizer()

    def get_tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when a call gives none: the checkpoint's recommendation."""
        return SamplingParams(**self._text.defaults)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continues every prompt; the outputs come in the prompts' order. Raises RequestError naming the
        wrong value.
        """
        listed: list[Prompt] = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        return self._wait(self._generate(listed, self._per_prompt(sampling_params, len(listed)), progress))

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers one chat, or several, through the checkpoint's chat template."""
        chats: list[list[Message]] = [messages] if messages and isinstance(messages[0], dict) else messages  # type: ignore[assignment]
        params = self._per_prompt(sampling_params, len(chats))

        async def answer() -> list[RequestOutput]:
            ids = [await self._text.chat_ids(chat) for chat in chats]
            return await self._generate(
                [TokensPrompt(prompt_token_ids=prompt_ids) for prompt_ids in ids], params, progress
            )

        return self._wait(answer())

    async def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], progress: bool
    ) -> list[RequestOutput]:
        ids = [
            await self._text.prompt_ids(p) if isinstance(p, str) else p["prompt_token_ids"] for p in prompts
        ]
        groups: list[list[Answer]] = []
        with contextlib.ExitStack() as stack:
            for prompt_ids, wanted in zip(ids, params, strict=True):
                groups.append(self._text.submit([prompt_ids], wanted))
                stack.enter_context(aborting(groups[-1]))
            await _complete([answer for group in groups for answer in group], progress)
        return [
            _output(self._text.tokenizer, prompt, prompt_ids, group)
            for prompt, prompt_ids, group in zip(prompts, ids, groups, strict=True)
        ]

    def _per_prompt(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ConfigError(
                f"{len(params)} sampling_params for {count} prompts", hint="give one for all, or one for each"
            )
        return list(params)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise EngineDied("this LLM has been closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C while waiting: what was asked for is given up
            future.cancel()
            raise


def _config(model: str, settings: dict[str, Any]) -> Config:
    fields = {
        cls: {field.name for field in dataclasses.fields(cls)} - {"model"}
        for cls in (ModelConfig, EngineConfig)
    }
    known = set().union(*fields.values())
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"LLM has no setting {unknown[0]!r}", hint=f"there are: {', '.join(sorted(known))}")
    parts = {
        cls: {name: value for name, value in settings.items() if name in names}
        for cls, names in fields.items()
    }
    return Config(
        model=ModelConfig(model=str(resolve_folder(model)), **parts[ModelConfig]),
        engine=EngineConfig(**parts[EngineConfig]),
    )


async def _connect(process: EngineProcess, folder: Path, name: str, progress: bool) -> TextEngine:
    tokenizer, defaults = await asyncio.to_thread(load_text, folder)  # while the engine loads
    with loading(name, shown=progress) as on_load_progress:
        engine = await AsyncEngine.connect(process, UNLIMITED, on_load_progress)
    return TextEngine(engine, tokenizer, defaults)


async def _complete(answers: list[Answer], progress: bool) -> None:
    with counting("answers", shown=progress) as move:
        done = 0
        move(done, len(answers))
        for finished in asyncio.as_completed([answer.complete() for answer in answers]):
            await finished
            done += 1
            move(done, len(answers))


def _close(
    loop: asyncio.AbstractEventLoop, thread: threading.Thread, stop_engine: Callable[[], object]
) -> None:
    """Ends the engine in its loop, then the loop, then the thread."""

    async def stop() -> None:
        stop_engine()

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _output(
    tokenizer: Tokenizer, prompt: Prompt, prompt_ids: list[int], answers: list[Answer]
) -> RequestOutput:
    first = answers[0]
    prompt_logprobs = None
    if first.prompt_logprobs is not None:
        prompt_logprobs = [
            None if entry is None else _candidates(tokenizer, entry) for entry in first.prompt_logprobs
        ]
    return RequestOutput(
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=prompt_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=[_completion(tokenizer, index, answer) for index, answer in enumerate(answers)],
        num_cached_tokens=first.cached_tokens,
    )


def _completion(tokenizer: Tokenizer, index: int, answer: Answer) -> CompletionOutput:
    asked = answer.stream.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=answer.text,
        token_ids=answer.ids,
        cumulative_logprob=sum(entry.logprob for entry in answer.logprobs) if asked else None,
        logprobs=[_candidates(tokenizer, entry) for entry in answer.logprobs] if asked else None,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )


def _candidates(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[int, Logprob]:
    """The token that stands there first, then the top candidates."""

    def all_of() -> Iterator[tuple[int, float, int]]:
        yield entry.token_id, entry.logprob, entry.rank + 1
        for index, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True)):
            yield token_id, logprob, index + 1

    return {
        token_id: Logprob(logprob, rank, tokenizer.decode([token_id], skip_special_tokens=False))
        for token_id, logprob, rank in all_of()
    }
