"""Chat messages to a prompt, through the chat template that the checkpoint carries."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from firebox.errors import RequestError, UnsupportedField
from firebox.text.tokenizer import Tokenizer

Message = dict[str, Any]


def render(tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool = True) -> str:
    """The prompt for `messages` ({"role", "content"}); content given as text parts is joined with line ends.

    Raises UnsupportedField without a chat template, RequestError (param `messages`) when the template refuses
    them.
    """
    if not tokenizer.fast.chat_template:
        raise UnsupportedField(
            "this checkpoint has no chat template",
            param="messages",
            hint="send a plain prompt to /v1/completions",
        )
    plain = [{**message, "content": _text(message.get("content"))} for message in messages]
    try:
        prompt = tokenizer.fast.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        # Templates fail in any of these ways on what they do not expect; all mean "not such messages".
        raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
    assert isinstance(prompt, str), type(prompt)
    return prompt


def chat_ids(
    tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of `render`'s prompt; the template writes special tokens itself, so none are added."""
    prompt = render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(prompt, add_special_tokens=False)


def _text(content: str | list[dict[str, Any]] | None) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)
