"""An answer in which there is nothing to read: no text at all, blanks, or the names of special tokens only
("<|endoftext|>", "<unk>").

Looks at the whole answer, content and reasoning together, once it has ended: a channel alone may well be
blank. An answer that reasons and then has no content is `no_content`'s. No good answer is empty, however
short: "42" passes. Failed requests are not judged; they are counted as failed.

Would have caught: `content: null` of gpt-oss on SM121 (vllm#37030), and output whose first Harmony token
was lost (vllm#41477).
"""

from __future__ import annotations

from firebox.bench.base import Finding
from firebox.bench.guards._text import visible
from firebox.bench.guards.base import excerpt

WHOLE_ANSWER = True  # `Watch` gives it both channels as one
_LONGEST = 2048  # characters to look at; blanks for longer than that are one_token's


class Guard:
    """One stream. Keeps nothing once something was there to read."""

    def __init__(self) -> None:
        self._text = ""
        self._read = False

    def see(self, block: str) -> Finding | None:
        """Never a finding: something may follow."""
        if not self._read and len(self._text) < _LONGEST:
            self._text += block
        self._read = self._read or bool(visible(self._text))
        return None

    def end(self, rest: str) -> Finding | None:
        """Whether the answer was empty."""
        if self._read or visible(self._text + rest):
            return None
        text = self._text + rest
        what = f"only blanks or special tokens: {excerpt(text)}" if text else "no text came"
        return Finding(guard="empty", verdict="empty", why=f"{len(text)} characters, {what}")
