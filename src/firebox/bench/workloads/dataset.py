"""Requests from a file: ShareGPT's JSON, or JSON lines.

    ShareGPT    [{"conversations": [{"from": "human", "value": …}, {"from": "gpt", …}, …]}, …]
    JSON lines  {"prompt": …} or {"messages": [{"role": …, "content": …}, …]}, and max_tokens where wanted

Of a ShareGPT conversation the human's turns are sent one after another, with the server's own answers between
them. Answers end where the model likes, at most at `max_tokens` or `output_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firebox.bench.base import Ask, Message, Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options
from firebox.errors import ConfigError

DEFAULTS: dict[str, Any] = {"concurrency": (1, 8, 32), "output_tokens": (512,), "requests": 8, "turns": 1}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each concurrency, its sessions drawn from the file. Raises ConfigError for a file that is
    neither form."""
    if options.file is None:
        raise ConfigError("the workload dataset needs a file", hint="--dataset FILE")
    sessions = read(options.file, options.output_tokens[0], options.turns)
    return [
        Phase(
            workload="dataset",
            concurrency=concurrency,
            sessions=tuple(prompts.draw.choices(sessions, k=concurrency * options.requests)),
            axes={"file": options.file.name, "output_tokens": options.output_tokens[0]},
        )
        for concurrency in options.concurrency
    ]


def read(file: Path, output_tokens: int, turns: int) -> list[Session]:
    """The sessions of `file`, of at most `turns` turns each. Raises ConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
        sessions = [session for record in records if (session := _session(record, output_tokens, turns))]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is neither ShareGPT's JSON nor JSON lines: {error}") from error
    if not sessions:
        raise ConfigError(f"{file} holds no request")
    return sessions


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _session(record: Mapping[str, Any], output_tokens: int, turns: int) -> Session | None:
    limit = int(record.get("max_tokens", output_tokens))
    if "conversations" in record:
        said = [turn["value"] for turn in record["conversations"] if turn["from"] in ("human", "user")]
        return _chat([(Message("user", text),) for text in said[:turns] if text], limit)
    if "messages" in record:
        return _chat([tuple(Message(m["role"], m["content"]) for m in record["messages"])], limit)
    return Session(asks=(Ask(prompt=str(record["prompt"]), max_tokens=limit, open_ended=True),))


def _chat(turns: Sequence[tuple[Message, ...]], limit: int) -> Session | None:
    asks = tuple(Ask(messages=messages, max_tokens=limit, open_ended=True) for messages in turns)
    return Session(asks=asks) if asks else None
