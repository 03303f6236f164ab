"""The end of the text repeats: the same words in the same order, again and again, with a period of up to
PERIOD characters.

Looked for twice. As it stands: enough exact rounds in a row (ROUNDS). Without its digits: rounds that
differ in a counter only ("step 17: …", "step 18: …"), but more of them, and only in prose: COUNTED_ROUNDS
rounds in which at least PROSE of the characters are letters and blanks and at most DIGITS digits. Tables,
logs, lists of JSON objects and test tables differ in their digits too, and those are good; they hold more
digits or more punctuation. So a loop of such lines whose numbers change is not found here.

Nearest good text: a chorus sung twice, rows of zeros in a source, lists of alike options. Songs that count
("ten green bottles") and answers that were asked to repeat are beyond it.

Would have caught: greedy answers that go round in the same sentence, the shape most corrupted caches and
wrong scales take before they turn to noise (vllm#40923, vllm#47194), at full speed and full length.
"""

from __future__ import annotations

from firebox.bench.base import Finding
from firebox.bench.guards.base import excerpt

PERIOD = 2048  # characters
# Enough is any of: (rounds, characters that they fill)
ROUNDS = ((4, 400), (3, 450), (2, 1200))
LAST_ROUNDS = (*ROUNDS, (5, 160), (3, 200))  # at the end of the stream
COUNTED_ROUNDS = ((6, 600),)
PROSE, DIGITS = 0.85, 0.1
_NEEDLE = 24  # characters whose earlier occurrences are candidates for a period
_CANDIDATES = 48
_KEPT = 3 * PERIOD
_DROP_DIGITS = {ord(digit): None for digit in "0123456789"}


class Guard:
    """One channel of one stream. Keeps the last characters, with and without digits."""

    def __init__(self) -> None:
        self._tail = ""
        self._bare = ""

    def see(self, block: str) -> Finding | None:
        """Whether the text ends in a loop."""
        self._tail, self._bare = self._with(block)
        return _judge(self._tail, self._bare, ROUNDS)

    def end(self, rest: str) -> Finding | None:
        """The same with the limits of an end."""
        return _judge(*self._with(rest), LAST_ROUNDS)

    def _with(self, text: str) -> tuple[str, str]:
        bare = text.translate(_DROP_DIGITS)
        return (self._tail + text)[-_KEPT:], (self._bare + bare)[-_KEPT:]


def _judge(tail: str, bare: str, enough: tuple[tuple[int, int], ...]) -> Finding | None:
    if period := _loop(tail, enough):
        return _finding(tail, period, "the same")
    period = _loop(bare, COUNTED_ROUNDS)
    if period and _prose(tail, bare, period):
        return _finding(tail, period, "the same but for its digits")
    return None


def _loop(text: str, enough: tuple[tuple[int, int], ...]) -> int | None:
    """The shortest period with which `text` ends for long enough."""
    needle = text[-_NEEDLE:]
    at = len(text) - len(needle)
    for _ in range(_CANDIDATES):
        at = text.rfind(needle, 0, at + len(needle) - 1)
        period = len(text) - len(needle) - at
        if at < 0 or period > PERIOD:
            return None
        for rounds, characters in enough:
            length = max(rounds * period, characters)
            if length <= len(text) and text[period - length :] == text[-length:-period]:
                return period
    return None


def _prose(tail: str, bare: str, period: int) -> bool:
    """Whether what repeats is written in words, and holds few digits."""
    words = sum(character.isalpha() or character == " " for character in bare[-period:])
    span = tail[-COUNTED_ROUNDS[0][1] :]
    digits = sum(character.isdigit() for character in span)
    return words >= PROSE * period and digits <= DIGITS * len(span)


def _finding(tail: str, period: int, how: str) -> Finding:
    why = f"the last rounds of {period} characters are {how}: …{excerpt(tail)}"
    return Finding(guard="suffix_loop", verdict="repetition", why=why)
