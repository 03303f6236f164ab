"""An engine with a tokenizer: prompts in, answers out."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

from firebox.answer.answer import Answer
from firebox.answer.params import SamplingParams
from firebox.engine.client import AsyncEngine
from firebox.errors import RequestError
from firebox.text.defaults import sampling_defaults
from firebox.text.made_up import made_up
from firebox.text.stream import require_stops
from firebox.text.templates import Message, chat_ids
from firebox.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
LONG_TEXT_CHARACTERS = 20_000


class TextEngine:
    """An engine that reads and writes text. `defaults`: the sampling that the checkpoint recommends."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, defaults: dict[str, float]) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._eos_ids = frozenset(engine.ready.eos_token_ids)

    async def prompt_ids(self, prompt: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a prompt; a long one is read in a thread, so that running answers go on."""
        if len(prompt) < LONG_TEXT_CHARACTERS:
            return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, prompt, add_special_tokens=add_special_tokens)

    async def chat_ids(self, messages: list[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a chat through the checkpoint's template; RequestError when the template refuses it."""
        if sum(len(str(message.get("content"))) for message in messages) < LONG_TEXT_CHARACTERS:
            return chat_ids(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)
        return await asyncio.to_thread(
            chat_ids, self.tokenizer, messages, add_generation_prompt=add_generation_prompt
        )

    def submit(self, prompts: list[list[int]], params: SamplingParams, *, priority: int = 0) -> list[Answer]:
        """Queues `params.n` answers for every prompt, all or none: prompt 0's answers first.

        Raises RequestError naming the field, QueueFull, EngineDied.
        """
        require_stops(params.stops())
        if params.n < 1:
            raise RequestError(f"n is {params.n}; it must be at least 1", param="n")
        self.engine.require_room(len(prompts) * params.n)
        answers: list[Answer] = []
        try:
            for prompt_ids in prompts:
                for choice in range(params.n):
                    stream = self.engine.submit(prompt_ids, params.engine_params(choice), priority)
                    answers.append(Answer(stream, self.tokenizer, params, self._eos_ids))
        except BaseException:
            for answer in answers:
                answer.abort()
            raise
        return answers


def load_text(folder: Path, *, dummy: bool = False) -> tuple[Tokenizer, dict[str, float]]:
    """The tokenizer and the recommended sampling of a model folder. `dummy`: its weights are made up, and so
    is a tokenizer that it does not have, as cards do not."""
    if dummy and not (folder / "tokenizer.json").is_file():
        log.warning("%s has no tokenizer.json: texts are bytes, and other ids read <id>", folder)
        return made_up(_vocab_size(folder)), sampling_defaults(folder)
    return Tokenizer.load(folder), sampling_defaults(folder)


def _vocab_size(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("text_config", config)["vocab_size"])
