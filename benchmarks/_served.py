"""`firebox serve` as a process, for benchmarks/engine.py: seconds until its port is open; streams at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from firebox.bench.base import Ask, Phase, Session
from firebox.bench.client import Client
from firebox.bench.drive import Run, drive
from firebox.bench.measures import rates
from firebox.bench.server import connect, discover
from firebox.bench.tokens import count

START_S = 560.0


@contextlib.contextmanager
def serving(arguments: Sequence[str], cache: str | None = None) -> Iterator[tuple[str, float]]:
    """A server on a free port: its URL, and the seconds from its start until /health answered 200."""
    folders = {} if cache is None else {"FIREBOX_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/its-own"}
    environment = dict(os.environ) | folders
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "firebox", "serve", *arguments, "--port", "0"],
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        url = _url(process)
        while httpx.get(f"{url}/health", timeout=10).status_code != 200:
            time.sleep(0.01)
        yield url, time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()


def _url(process: subprocess.Popen[str]) -> str:
    """What the server says when it serves; its log goes to stderr."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            if match := re.search(r"serves .* at (http://\S+)$", line):
                found.put(match[1])
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    url = found.get(timeout=START_S)
    if url is None:
        raise SystemExit(f"the server ended while it started, with status {process.wait()}")
    return url


def port_open(arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds until /health is 200: with empty cache folders, Triton's too, and with what that start left."""
    with tempfile.TemporaryDirectory() as cache:
        found = {}
        for how in ("cold", "warm"):
            with serving(arguments, cache) as (_, seconds):
                found[f"{how}_s"] = round(seconds, 2)
    return found


def streams(arguments: Sequence[str], at_once: int, prompt: int, output: int, vocab: int) -> dict[str, Any]:
    """What so many streams at once get, after a run that was not measured, and how the steps ran."""
    with serving(arguments) as (url, _), connect(url) as http:
        target = discover(http).target
        runs, steps = asyncio.run(_runs(target, http, at_once, prompt, output, vocab))
    found, failed = rates(runs), [a.error for a in runs.answers if a.error is not None]
    return {
        "streams": at_once,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "tokens_per_s": round(found.output_tok_s_wall, 1),
        "steady_tokens_per_s": found.output_tok_s_steady and round(found.output_tok_s_steady, 1),
        "decode_tokens_per_s": found.decode_tok_s and round(found.decode_tok_s, 1),
        "failed": failed,
        "steps": steps,
        "eager_decode_steps": sum(
            n for mode, n in steps.items() if mode.startswith("eager/") and mode != "eager/prefill"
        ),
    }


async def _runs(
    target: Any, http: httpx.Client, at_once: int, prompt: int, output: int, vocab: int
) -> tuple[Run, dict[str, int]]:
    random_ids = random.Random(at_once)

    def phase() -> Phase:
        prompts = [tuple(random_ids.randrange(256, vocab) for _ in range(prompt)) for _ in range(at_once)]
        asks = [Ask(prompt=ids, prompt_tokens=prompt, max_tokens=output) for ids in prompts]
        sessions = tuple(Session(asks=(ask,)) for ask in asks)
        return Phase(workload="streams", concurrency=at_once, sessions=sessions)

    async with Client(target) as client:
        await drive(client, phase())  # kernels, and graphs of the batches on the way to the full one
        before = modes(http)
        run = await drive(client, phase())
        after = modes(http)
    count(run.answers, None)
    moved = {mode: int(n - before.get(mode, 0)) for mode, n in after.items() if n != before.get(mode, 0)}
    return run, moved


def modes(http: httpx.Client) -> dict[str, float]:
    """firebox_steps_total by "mode/reason"."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        f"{sample.labels['mode']}/{sample.labels['reason']}": sample.value
        for family in families
        for sample in family.samples
        if sample.name == "firebox_steps_total"
    }
