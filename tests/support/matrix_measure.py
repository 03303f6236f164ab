"""A small measurement of an OpenAI-compatible server, as the matrix calls it: streams over httpx, counts by
usage, and sees the two kinds of degenerate text that examples/matrix/faulty_server.py can produce.

    python -m tests.support.matrix_measure SPEC.toml --out DIR    `firebox matrix run` with this measurement
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from firebox.bench.base import Finding
from firebox.bench.statistics import percentiles
from firebox.cli.matrix import run_grid
from firebox.matrix.base import Load, Measured, Row

PROMPT = "def read_lines(path):\n    '''Reads the lines of a file {number}.'''\n"


class Answered:
    """One request: its text, its tokens and its times in seconds."""

    def __init__(self) -> None:
        self.text, self.tokens, self.error = "", 0, ""
        self.began = self.first = self.ended = time.perf_counter()
        self.silent = False


def measure(
    url: str, load: Load, *, deadline_s: float, silence_s: float, alive: Callable[[], bool]
) -> Measured:
    """See firebox.matrix.base.Measure."""
    deadline = time.perf_counter() + deadline_s
    rows, findings = [], []
    for concurrency in load.concurrency:
        if not alive():
            return Measured(rows=tuple(rows), findings=tuple(findings), ended="dead")
        if time.perf_counter() > deadline:
            return Measured(rows=tuple(rows), findings=tuple(findings), ended="deadline")
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            jobs = [
                pool.submit(ask, url, load, number, silence_s)
                for number in range(concurrency * load.requests)
            ]
            answers = [job.result() for job in jobs]
        found = guard(answers)
        findings += found
        rows.append(row(concurrency, answers, time.perf_counter() - began, found))
        if any(answer.silent for answer in answers):
            return Measured(rows=tuple(rows), findings=tuple(findings), ended="silent")
    return Measured(rows=tuple(rows), findings=tuple(findings))


def ask(url: str, load: Load, number: int, silence_s: float) -> Answered:
    answer = Answered()
    body = {
        "prompt": PROMPT.format(number=number),
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=silence_s) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    take(answer, json.loads(line[6:]))
    except httpx.ReadTimeout:
        answer.silent, answer.error = True, "silent"
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    answer.ended = time.perf_counter()
    if not answer.error and not answer.tokens:
        answer.error = "no usage"
    return answer


def take(answer: Answered, event: dict) -> None:
    if "error" in event:
        answer.error = event["error"]["message"]
        return
    if event["choices"] and event["choices"][0]["text"]:
        if not answer.text:
            answer.first = time.perf_counter()
        answer.text += event["choices"][0]["text"]
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]


def guard(answers: list[Answered]) -> list[Finding]:
    found = []
    for answer in answers:
        text = answer.text.strip()
        if len(text) > 8 and len(set(text)) == 1 and not text[0].isalnum():
            found.append(Finding(guard="one_character", verdict="garbage", why=f"only {text[:8]!r}"))
        elif re.search(r"([^\n]{12,60})\1\1", text):
            found.append(Finding(guard="loop", verdict="repetition", why=f"again and again {text[:20]!r}"))
    return found


def row(concurrency: int, answers: list[Answered], wall_s: float, found: list[Finding]) -> Row:
    good = [answer for answer in answers if not answer.error]
    verdict = found[0].verdict if found else "failed" if len(good) < len(answers) else "ok"
    if verdict != "ok":
        return Row(
            concurrency=concurrency,
            requests=len(answers),
            failed=len(answers) - len(good),
            verdict=verdict,
            error=next((answer.error for answer in answers if answer.error), None),
        )
    wall = sum(answer.tokens for answer in good) / wall_s
    return Row(
        concurrency=concurrency,
        requests=len(answers),
        failed=0,
        verdict="ok",
        output_tok_s_wall=wall,
        output_tok_s_sum=sum(answer.tokens / (answer.ended - answer.began) for answer in good),
        ttft_ms=percentiles([1e3 * (answer.first - answer.began) for answer in good]),
        tpot_ms=percentiles([1e3 * (a.ended - a.first) / max(1, a.tokens - 1) for a in good]),
        tokens_counted_by="usage",
        repeats=(wall,),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    sys.exit(0 if run_grid(given.spec, given.out, measure, as_json=True) else 1)
