"""Records real streams of the bundled model for the tests of `bench/guards`: greedy answers, which end in
loops, and answers sampled at temperature 1, which do not. One JSON line a stream, with its pieces as tokens.

    python tools/record_streams.py OUT.jsonl

Prompts are lines of this repository's sources, so that the file can be made again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from firebox import LLM, SamplingParams
from firebox.text.tokenizer import Tokenizer

SOURCES = Path(__file__).resolve().parents[1] / "src" / "firebox"
PROMPTS = 64  # for each of the two temperatures
MAX_TOKENS = 500


def prompts() -> list[str]:
    """The first function of every file that has one, its `def` line and what stands before it."""
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        before, line, _ = path.read_text().partition("\ndef ")
        if line:
            found.append(before[-200:] + line)
    step = max(1, len(found) // PROMPTS)
    return found[::step][:PROMPTS]


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text token by token; the bytes of a character that several tokens hold come with the last one."""
    out: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if not text.endswith("\ufffd") or end - start >= 4:
            out.append(text)
            start = end
    return [*out, *([tokenizer.decode(ids[start:])] if start < len(ids) else [])]


def main() -> None:
    """Writes the file named on the command line."""
    with LLM() as llm, Path(sys.argv[1]).open("w") as file:
        tokenizer = llm.get_tokenizer()
        for temperature in (0.0, 1.0):
            wanted = SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=11)
            for number, answer in enumerate(llm.generate(prompts(), wanted)):
                name = f"firebox-tiny-{'greedy' if temperature == 0 else 'sampled'}-{number}"
                record = {"name": name, "pieces": pieces(tokenizer, answer.outputs[0].token_ids)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
