"""The same answer to different prompts, word for word or nearly.

Answers are compared as words, in lower case and without punctuation, those of at least LONG words (short
ones such as "Yes." agree by nature). Nearly the same: of the shorter answer's runs of GRAM words, ALIKE are
in the other one too. Prompts that differ in words with digits only count as one prompt, which may well have
one answer. In chats the last message stands for the prompt, and its answer must differ from others too.

Verdict: garbage where more than MOST of the prompts have an answer that another has, otherwise suspicious.
Nearest good case: models that answer a prompt of random tokens with the same apology; this finds that too,
and rightly: the row did not measure answers to its prompts. Would catch kernels that return zeros at some
batch sizes (fi#3398), so that all prompts are answered alike, and caches that hand one request the state of
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from zlib import crc32

from firebox.bench.base import Answer, Finding
from firebox.bench.guards._text import prompt_key, words
from firebox.bench.guards.base import Reference, excerpt

LONG = 12  # words
GRAM = 4  # words
ALIKE = 0.8  # of the shorter answer's runs
MOST = 0.5  # of the prompts
_HASHES = tuple(range(1, 13))  # two texts with nine tenths in common share at least one minimum, surely


def judge(answers: Sequence[Answer], references: Mapping[str, Reference]) -> list[Finding]:
    """One finding that names all answers which others repeat, or none."""
    long = [(a, said) for a in answers if a.error is None and len(said := words(a.text)) >= LONG]
    prompts = {prompt_key(answer.ask) for answer, _ in long}
    same = _same([(answer, _grams(said)) for answer, said in long])
    if not same:
        return []
    share = len({prompt_key(answer.ask) for answer in same}) / len(prompts)
    why = (
        f"{share:.0%} of {len(prompts)} different prompts have an answer that is at "
        f"least {ALIKE:.0%} that of another: "
        f"…{excerpt(same[0].text)}"
    )
    verdict = "garbage" if share > MOST else "suspicious"
    return [Finding(guard="same_text", verdict=verdict, why=why, answers=tuple(a.number for a in same))]


def _same(texts: Sequence[tuple[Answer, frozenset[int]]]) -> list[Answer]:
    """Those that are alike, in order. Compared are only texts that share a minimum, so many cost little."""
    first: dict[tuple[int, int], list[int]] = {}
    alike: set[int] = set()
    for index, (answer, grams) in enumerate(texts):
        for salt in _HASHES:
            before = first.setdefault(
                (salt, min(gram * salt * 0x9E3779B1 & 0xFFFFFFFF for gram in grams)), []
            )
            for other in before:
                if prompt_key(texts[other][0].ask) != prompt_key(answer.ask) and _alike(
                    texts[other][1], grams
                ):
                    alike |= {other, index}
                    break
            else:
                before.append(index)
    return [texts[index][0] for index in sorted(alike)]


def _grams(said: Sequence[str]) -> frozenset[int]:
    """The runs of GRAM words, as numbers that are the same in every process."""
    pairs = [crc32(f"{a} {b}".encode()) for a, b in pairwise(said)]
    return frozenset(crc32(f"{a} {b}".encode()) for a, b in zip(pairs, pairs[GRAM - 2 :], strict=False))


def _alike(some: frozenset[int], others: frozenset[int]) -> bool:
    return len(some & others) >= ALIKE * min(len(some), len(others))
