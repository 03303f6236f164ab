"""Text that is no text: replacement characters, control characters, halves of surrogate pairs, and words in
which scripts that nobody mixes stand side by side.

    U+FFFD              REPLACED in a window, less those at the very end (a character that was cut)
    control characters  CONTROLS in a window, other than tab, newline, carriage return, form feed and escape
    lone surrogates     one: no valid UTF-8 has any
    scripts in a word   MIXED neighbours of different scripts in a window with at least SCRIPTS scripts. Han,
                        kana, hangul and Latin may touch each other (Chinese writes 用Python编写), and so may
                        Greek and Latin (μm). A list of languages has many scripts, but blanks between them.

Nearest good text: an answer about U+FFFD, which shows it once or twice; terminal output with escapes; a
table of greetings. Random tokens of a byte-level vocabulary break a code point every few dozen tokens, so
this finds random text unless it is all of whole ASCII words: that kind nothing here can tell from a style
(see `reference`).

Would have caught: random text of an FP8 cache under graphs (vllm#41651), word salad of layers loaded with
the wrong scheme (sgl#23467).
"""

from __future__ import annotations

import re

from firebox.bench.base import Finding
from firebox.bench.guards.base import excerpt

WINDOW = 1024  # characters
REPLACED = 4
CONTROLS = 4
MIXED, SCRIPTS = 6, 4
_ODD = re.compile("[\ufffd\ud800-\udfff\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
# one class for all that may touch Latin; a letter outside of every range counts for none
_RANGES = {
    "latin or east asian": "A-Za-zÀ-ɏͰ-Ͽ\u1e00-\u1eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u052f",
    "hebrew": "\u05d0-\u05ea",
    "arabic": "\u0620-\u06ff",
    "indic": "\u0900-\u0dff",
    "thai": "\u0e00-\u0eff",
    "georgian": "\u10a0-\u10ff",
    "armenian": "\u0530-\u058f",
    "ethiopic": "\u1200-\u137f",
}
_SCRIPT = {name: re.compile(f"[{span}]+") for name, span in _RANGES.items()}


class Guard:
    """One channel of one stream. Keeps the last WINDOW characters."""

    def __init__(self) -> None:
        self._tail = ""

    def see(self, block: str) -> Finding | None:
        """Whether the last WINDOW characters hold too much of it."""
        self._tail = (self._tail + block)[-WINDOW:]
        return _judge(self._tail)

    def end(self, rest: str) -> Finding | None:
        """The same, less a character that was cut at the end."""
        text = (self._tail + rest)[-WINDOW:]
        return _judge(text.rstrip("\ufffd") if len(text) - len(text.rstrip("\ufffd")) < REPLACED else text)


def _judge(text: str) -> Finding | None:
    if text.isascii() and text.isprintable():
        return None
    odd = _ODD.findall(text)
    replaced = odd.count("\ufffd")
    surrogates = sum("\ud800" <= character <= "\udfff" for character in odd)
    controls = len(odd) - replaced - surrogates
    for count, limit, what in (
        (surrogates, 1, "halves of surrogate pairs"),
        (replaced, REPLACED, "replacement characters U+FFFD"),
        (controls, CONTROLS, "control characters"),
        (_mixed(text), MIXED, "neighbouring letters of scripts that are not mixed"),
    ):
        if count >= limit:
            why = f"{count} {what} in {len(text)} characters (limit {limit}): …{excerpt(text)}"
            return Finding(guard="invalid_utf8", verdict="garbage", why=why)
    return None


def _mixed(text: str) -> int:
    """How many letters are followed at once by one of another script; 0 in fewer than SCRIPTS scripts."""
    if text.isascii():
        return 0
    spans = {name: [m.span() for m in pattern.finditer(text)] for name, pattern in _SCRIPT.items()}
    if sum(bool(found) for found in spans.values()) < SCRIPTS:
        return 0
    starts = {start for found in spans.values() for start, _ in found}
    return sum(end in starts for found in spans.values() for _, end in found)
