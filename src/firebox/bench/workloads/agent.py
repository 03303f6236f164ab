"""A coding agent at work: a long beginning with instructions, then turn after turn a tool's output and a
short answer, all in one growing conversation, with a pause while the tool runs.

Every place holds one conversation at a time. The lengths are our choice, not a recording: 2,048 tokens of
instructions, tool outputs of 128 to 2,048 tokens of which most are short, half a second between an answer and
the next request.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from firebox.bench.base import Ask, Message, Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.workloads.base import Options

TOOL_TOKENS = (128, 128, 256, 256, 512, 2048)
PAUSE_S = 0.5
DEFAULTS: dict[str, Any] = {
    "concurrency": (1, 4, 16),
    "prompt_tokens": (2048,),
    "output_tokens": (256,),
    "turns": 8,
    "requests": 2,
}


def phases(prompts: Prompts, options: Options) -> list[Phase]:
    """One for each concurrency; `requests` conversations a place."""
    return [
        Phase(
            workload="agent",
            concurrency=concurrency,
            sessions=tuple(
                _conversation(prompts, options.turns, length, output)
                for _ in range(concurrency * options.requests)
            ),
            axes={"turns": options.turns, "prompt_tokens": length, "output_tokens": output},
        )
        for length in options.prompt_tokens
        for output in options.output_tokens
        if options.fits(length + options.turns * (output + max(TOOL_TOKENS)))
        for concurrency in options.concurrency
    ]


def _conversation(prompts: Prompts, turns: int, length: int, output: int) -> Session:
    asks = [prompts.turn(prompts.draw.choice(TOOL_TOKENS), output) for _ in range(turns)]
    asks[0] = _instructed(asks[0], prompts.text(length))
    return Session(asks=tuple(asks), pause_s=PAUSE_S)


def _instructed(ask: Ask, instructions: str) -> Ask:
    return replace(ask, messages=(Message("system", instructions), *ask.messages))
