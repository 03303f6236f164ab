"""Answers against those of a server known to be right (`--reference FILE`), prompt by prompt.

The file has one JSON object a line: {"prompt": …, "answer": …} and, if recorded, "perplexity". Answers
should be greedy. Two measures, over the words that both answers have:

    until   the share of words that are equal up to the first difference
    overlap the share of words, as a bag, that both have

Two correct servers rarely agree to the end: one rounding decides between two words, and the rest differs in
wording. So `until` alone says little and is reported only. What the guard asks is whether answers are
*about* their prompts: the mean overlap with the own reference must exceed that with the other prompts'
references by MARGIN. Two texts of one language share their small words whatever they say, and the others'
overlap is just that. With references for fewer than two prompts the limit is ALONE instead.

Perplexity, where the server told logprobs (`Piece.logprobs`), is that of an answer under its own model. Not
a number, or a logprob above 0: garbage. Above FLAT, as flat logits give: garbage. More than RATIO times the
reference's: suspicious.

It sees: word salad, text on another subject, another language, noise. It does not see a model that is a
little worse (quantised too hard: use an evaluation), a confident loop (low perplexity; the streaming guards
see it), or facts that are wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from firebox.bench.base import Answer, Finding
from firebox.bench.guards._text import prompt_text, words
from firebox.bench.guards.base import Reference
from firebox.errors import ConfigError

MARGIN = 0.1
ALONE = 0.25
FLAT = 200.0  # good text has 1.5 to 30, a uniform choice of 32,000 tokens 32,000
RATIO = 3.0


def load(path: Path) -> dict[str, Reference]:
    """A file of references, by prompt. Raises ConfigError naming the line that is none."""
    if not path.is_file():
        raise ConfigError(f"there is no reference file {path}")
    found = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            reference = msgspec.json.decode(line, type=Reference)
        except msgspec.MsgspecError as error:
            hint = 'each line is {"prompt": "…", "answer": "…"}'
            raise ConfigError(f"{path}:{number} is no reference: {error}", hint=hint) from error
        found[reference.prompt] = reference
    if not found:
        raise ConfigError(f"{path} holds no reference")
    return found


def judge(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    """A finding for each measure that fails. Perplexity is judged without references too."""
    finished = [answer for answer in answers if answer.error is None]
    found = _perplexities(finished, references)
    if not references:
        return found
    pairs = [(a, references[prompt_text(a.ask)]) for a in finished if prompt_text(a.ask) in references]
    if not pairs:
        why = (
            f"none of {len(finished)} answers is to one of the {len(references)} "
            "reference prompts: nothing was compared"
        )
        return [*found, _finding("suspicious", why, [])]
    return [*found, *_agreement(pairs, list(references.values()))]


def until(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Which share of the words, of as many as both have, is equal up to the first difference."""
    both = min(len(answer), len(reference))
    equal = next((i for i in range(both) if answer[i] != reference[i]), both)
    return equal / both if both else float(not answer and not reference)


def overlap(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Which share of the words, of as many as both have, is in the other one too, wherever it stands."""
    both = min(len(answer), len(reference))
    if not both:
        return float(not answer and not reference)
    return (Counter(answer[:both]) & Counter(reference[:both])).total() / both


def perplexity(answer: Answer) -> float | None:
    """Of the answer's own tokens; None where the server told no logprobs; nan where one is impossible."""
    told = [logprob for piece in answer.pieces for logprob in piece.logprobs or ()]
    if not told:
        return None
    if any(math.isnan(logprob) or logprob > 1e-3 for logprob in told):
        return math.nan
    return math.exp(min(-sum(told) / len(told), 700.0))


def _agreement(pairs: Sequence[tuple[Answer, Reference]], references: Sequence[Reference]) -> list[Finding]:
    said = [(words(answer.content), words(reference.answer)) for answer, reference in pairs]
    own = _mean([overlap(*pair) for pair in said])
    others = [
        overlap(words(answer.content), words(other.answer))
        for (answer, reference) in pairs
        for other in references[:16]
        if other.prompt != reference.prompt
    ]
    limit = _mean(others) + MARGIN if others else ALONE
    if own >= limit:
        return []
    why = (
        f"answers share {own:.0%} of their words with their references (limit "
        f"{limit:.0%}: as much as with those of "
        f"other prompts, and {MARGIN:.0%}); "
        f"{_mean([until(*pair) for pair in said]):.0%} are equal until the first difference"
    )
    return [_finding("garbage", why, [answer for answer, _ in pairs])]


def _perplexities(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    told = [(answer, value) for answer in answers if (value := perplexity(answer)) is not None]
    flat = [answer for answer, value in told if math.isnan(value) or value > FLAT]
    worse = [
        answer
        for answer, value in told
        if (r := references.get(prompt_text(answer.ask))) and r.perplexity and value > RATIO * r.perplexity
    ]
    return [
        _finding(verdict, f"{len(some)} of {len(told)} answers have a perplexity {what}", some)
        for verdict, what, some in (
            ("garbage", f"above {FLAT:g}, or logprobs that are none", flat),
            ("suspicious", f"above {RATIO:g} times their reference's", worse),
        )
        if len(some) * 2 > len(told)
    ]


def _finding(verdict: str, why: str, answers: Sequence[Answer]) -> Finding:
    return Finding(guard="reference", verdict=verdict, why=why, answers=tuple(a.number for a in answers))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
