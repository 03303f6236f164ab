"""`firebox generate [MODEL] --prompt …`: one answer offline, with its speed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firebox.cli.options import takes
from firebox.config import Config
from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.answer import Answer, Piece, SamplingParams, TextEngine

PROGRESS_POLL_S = 0.1
MAX_QUEUED_REQUESTS = 1


@dataclass(frozen=True)
class Ask:
    """What to answer, and how to show it."""

    prompt: str
    chat: bool
    sampling: dict[str, Any]
    stream: bool
    as_json: bool


@takes("model", "engine")
def generate(
    config: Config,
    *,
    prompt: Annotated[str | None, typer.Option(help="the prompt; - reads it from stdin")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="a file that holds the prompt")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="the prompt is a user's message, put through the chat template")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0: greedy; default: the checkpoint's, else 1")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="default: the checkpoint's, else 1")] = None,
    top_k: Annotated[int | None, typer.Option(help="default: the checkpoint's, else off")] = None,
    seed: Annotated[int | None, typer.Option(help="makes a sampled answer repeatable")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="ends the answer before this string; may be given again")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="print tokens as they come; default: on a terminal"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the last line is a JSON document")] = False,
) -> None:
    """Answers one prompt without a server."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    ask = Ask(
        prompt=_read_prompt(prompt, prompt_file),
        chat=chat,
        sampling={name: value for name, value in sampling.items() if value is not None},
        stream=stream if stream is not None else sys.stdout.isatty() and not as_json,
        as_json=as_json,
    )
    document = _run(config, ask)
    if ask.as_json:
        print(json.dumps(document, ensure_ascii=False), flush=True)
        return
    print(
        f"{len(document['ids'])} tokens, {document['tokens_per_s']:.0f} tokens/s, "
        f"the first after {document['ttft_ms']:.0f} ms; loaded in {document['load_s']:.1f} s",
        file=sys.stderr,
    )


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("give either --prompt or --prompt-file", hint="--prompt - reads stdin")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file: {error}") from error
    assert prompt is not None
    return sys.stdin.read() if prompt == "-" else prompt


def _run(config: Config, ask: Ask) -> dict[str, Any]:
    from firebox.engine.client import EngineProcess
    from firebox.text.folder import resolve_folder

    began_s = time.perf_counter()
    folder = resolve_folder(config.model.model)
    name = config.model.served_model_name or Path(config.model.model).name
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, model=str(folder)))
    process = EngineProcess.start(config)
    try:
        document = asyncio.run(_load_and_answer(process, folder, name, ask, began_s))
    finally:
        process.stop()
    return document


async def _load_and_answer(process: Any, folder: Path, name: str, ask: Ask, began_s: float) -> dict[str, Any]:
    from firebox.answer import SamplingParams, TextEngine, load_text
    from firebox.answer.progress import loading
    from firebox.engine.client import AsyncEngine

    with loading(name) as on_load_progress:
        tokenizer, defaults = await asyncio.to_thread(load_text, folder)  # while the engine loads
        engine = await AsyncEngine.connect(process, MAX_QUEUED_REQUESTS, on_load_progress)
    load_s = time.perf_counter() - began_s
    try:
        text = TextEngine(engine, tokenizer, defaults)
        document = await _answer(text, SamplingParams(**{**defaults, **ask.sampling}), ask)
    finally:
        engine.stop()
    return {**document, "model": name, "load_s": round(load_s, 3)}


async def _answer(text: TextEngine, params: SamplingParams, ask: Ask) -> dict[str, Any]:
    if ask.chat:
        prompt_ids = await text.chat_ids([{"role": "user", "content": ask.prompt}])
    else:
        prompt_ids = await text.prompt_ids(ask.prompt)
    began_s = time.perf_counter()
    [answer] = text.submit([prompt_ids], params)
    first = await _first_piece(answer)
    first_s = last_s = time.perf_counter()
    _show(first.text, ask)
    async for piece in answer:
        _show(piece.text, ask)
        last_s = time.perf_counter()
    print("" if ask.stream else answer.text, flush=True)
    return {
        "text": answer.text,
        "ids": answer.ids,
        "prompt_ids": prompt_ids,
        "finish_reason": answer.finish_reason,
        "cached_tokens": answer.cached_tokens,
        "ttft_ms": round((first_s - began_s) * 1e3, 3),
        "tokens_per_s": round(_speed(len(first.ids), len(answer.ids), began_s, first_s, last_s), 3),
    }


def _speed(first_tokens: int, tokens: int, began_s: float, first_s: float, last_s: float) -> float:
    """Decode speed: what comes with the first piece belongs to the prefill, unless there is nothing else."""
    if tokens > first_tokens:
        return (tokens - first_tokens) / (last_s - first_s)
    return tokens / (first_s - began_s)


async def _first_piece(answer: Answer) -> Piece:
    """Waits for the first piece, under a bar over the prompt."""
    from firebox.answer.progress import counting

    with counting("reading the prompt") as move:

        async def follow() -> None:
            while True:
                if (progress := answer.stream.progress) is not None:
                    move(progress.computed_tokens, progress.prompt_tokens)
                await asyncio.sleep(PROGRESS_POLL_S)

        following = asyncio.ensure_future(follow())
        try:
            return await anext(answer)
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following


def _show(text: str, ask: Ask) -> None:
    if ask.stream and text:
        sys.stdout.write(text)
        sys.stdout.flush()
