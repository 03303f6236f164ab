"""What a reader would see of a text."""

from __future__ import annotations

import re

from firebox.bench.base import Ask

# "<|endoftext|>", "<unk>", "</s>", "<pad>", "[PAD]", "<｜end▁of▁sentence｜>", "<0x0A>", "<|reserved_12|>"
_SPECIAL = re.compile(
    r"<[|｜][^<>]{1,40}[|｜]>|</?(?:unk|s|pad|bos|eos|mask|eot|eod|unused\d+|0x[0-9A-Fa-f]{2})>|\[(?:PAD|UNK|CLS|SEP|MASK)\]"
    r"|<(?:start|end)_of_turn>"
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


def visible(text: str) -> str:
    """Without the names of special tokens, and without blanks around it."""
    return _SPECIAL.sub("", text).replace("\ufeff", "").replace("\u200b", "").strip()


def words(text: str) -> list[str]:
    """Its words in lower case, without punctuation; a character of Chinese, Japanese or Korean is a word."""
    return _WORD.findall(text.casefold())


def prompt_key(ask: Ask) -> str:
    """What makes two prompts different. Words with a digit in them do not: they may be a nonce that a
    workload adds so that nothing is found in a cache."""
    if isinstance(ask.prompt, tuple):
        return " ".join(map(str, ask.prompt))
    text = prompt_text(ask)
    return " ".join(word for word in words(text) if not any(letter.isdigit() for letter in word)) or text


def prompt_text(ask: Ask) -> str:
    """The prompt as references name it: the text, or the last message of a chat; "" for one of ids."""
    if isinstance(ask.prompt, str):
        return ask.prompt
    return ask.messages[-1].content if ask.messages else ""
