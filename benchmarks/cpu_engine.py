"""The engine on a CPU against `transformers.generate`, on the bundled model: `python benchmarks/cpu_engine.py
[--json]`.

Every figure is a ratio of two times from this run on this machine, so that a slow machine slows both. Both
sides are greedy, ignore end-of-sequence and produce the same number of tokens; the ids are compared first,
and a difference ends the run. transformers runs in a process of its own with every experts implementation it
has and both with the engine's thread count and with all cores; the best counts. Our side is the product as it
comes: `LLM` offline and `firebox serve` over HTTP on loopback, default settings.

    single_stream_ratio         tokens/s of one stream, ours ÷ transformers
    concurrent16_vs_sequential  16 requests at once, total tokens/s, ours ÷ transformers one after another
    concurrent16_vs_batch16     the same ÷ transformers with the 16 as one batch
    prefix_ttft_ratio           time to first token of a second request sharing 1,000 tokens ÷ the first's
    http_overhead               1 − streamed tokens/s over HTTP ÷ offline, 16 requests at once
    start_to_first_token_s      `firebox serve` (kernels compiled before) to the first token over HTTP
    peak_rss_bytes              peak resident memory of server and engine process, after the HTTP load
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import firebox
from firebox import LLM, SamplingParams

MODEL = "firebox-tiny"
FOLDER = Path(firebox.__file__).parent / "assets" / MODEL
REQUESTS, TOKENS, REPEATS = 16, 128, 5
LIMITS = {
    "single_stream_ratio": (">=", 3.0),
    "concurrent16_vs_sequential": (">=", 8.0),
    "concurrent16_vs_batch16": (">=", 2.0),
    "prefix_ttft_ratio": ("<=", 0.15),
    "http_overhead": ("<=", 0.10),
    "start_to_first_token_s": ("<=", 6.0),
    "peak_rss_bytes": ("<=", 1.2e9),
}
Prompts = list[list[int]]


def prompts(llm: LLM) -> Prompts:
    """16 prompts of 64 tokens of Python source, all different."""
    ids = llm.get_tokenizer().encode(Path(argparse.__file__).read_text(encoding="utf-8"))
    return [ids[100 * i : 100 * i + 64] for i in range(1, REQUESTS + 1)]


def median_s(action: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median wall seconds of `action`, after one call that does not count."""
    action()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---- the reference, in a process of its own


def reference(wanted: Prompts, threads: list[int]) -> dict[str, Any]:
    """transformers' greedy ids and its best seconds for one stream, 16 in turn and a batch of 16."""
    argv = [sys.executable, __file__, "--reference", json.dumps({"prompts": wanted, "threads": threads})]
    out = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def run_reference(asked: dict[str, Any]) -> None:
    """Measures transformers and prints one JSON line."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor(asked["prompts"])

    def generate(rows: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    settings = {}
    for threads in asked["threads"]:
        torch.set_num_threads(threads)
        for experts in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(experts)
            settings[f"{experts}, {threads} threads"] = {
                "single_s": median_s(lambda: generate(ids[:1])),
                "batch16_s": median_s(lambda: generate(ids), 3),
            }
    best = {key: min(settings, key=lambda name: settings[name][key]) for key in ("single_s", "batch16_s")}
    experts, threads = best["single_s"].split(", ")
    model.set_experts_implementation(experts)
    torch.set_num_threads(int(threads.split()[0]))
    outputs: list[list[int]] = []

    def in_turn() -> None:
        outputs[:] = [generate(ids[i : i + 1])[0, ids.shape[1] :].tolist() for i in range(len(ids))]

    sequential_s = median_s(in_turn, 1)
    answer = {
        "outputs": outputs,
        "single_s": settings[best["single_s"]]["single_s"],
        "batch16_s": settings[best["batch16_s"]]["batch16_s"],
        "sequential_s": sequential_s,
        "best": best,
        "settings": settings,
        "version": transformers.__version__,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


# ---- ours, offline


def offline(llm: LLM, wanted: Prompts) -> dict[str, Any]:
    """Our greedy ids, and seconds for one stream and for 16 at once."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)

    def generate(rows: Prompts) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], params)
        return [output.outputs[0].token_ids for output in outputs]

    return {
        "outputs": generate(wanted),
        "single_s": median_s(lambda: generate(wanted[:1])),
        "concurrent16_s": median_s(lambda: generate(wanted)),
    }


def prefix_ttft(llm: LLM) -> dict[str, float]:
    """Milliseconds to the first token of a request with 1,000 tokens of new prompt, and of a second one that
    shares them."""
    ids = llm.get_tokenizer().encode(Path(argparse.__file__).read_text(encoding="utf-8"))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    first, second = [], []
    for i in range(REPEATS + 1):
        shared = ids[
            500 * i + 7 : 500 * i + 1007
        ]  # no two start alike, so that only the second of each pair hits
        for times, suffix in ((first, ids[:20]), (second, ids[20:40])):
            began = time.perf_counter()
            llm.generate({"prompt_token_ids": [*shared, *suffix]}, params)
            times.append((time.perf_counter() - began) * 1e3)
    return {"first_ms": statistics.median(first[1:]), "second_ms": statistics.median(second[1:])}


# ---- ours, over HTTP


class Server:
    """`firebox serve` on a free port of the loopback."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.began = time.perf_counter()
        argv = [sys.executable, "-m", "firebox", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until the port accepts connections."""
        while time.perf_counter() - self.began < timeout_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                raise RuntimeError(f"firebox serve ended with status {self.process.returncode}")
            time.sleep(0.005)
        raise TimeoutError(f"firebox serve opened no port within {timeout_s} s")

    def peak_rss_bytes(self) -> int:
        """Peak resident bytes of the server process and its children, added up."""
        pids = [self.process.pid, *_children(self.process.pid)]
        return sum(_status_kb(pid, "VmHWM") for pid in pids) * 1024

    def stop(self) -> None:
        """Ends the server and waits."""
        self.process.terminate()
        self.process.wait(30)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _status_kb(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


async def stream(port: int, prompt_ids: list[int], max_tokens: int) -> tuple[int, float]:
    """One streamed completion: completion tokens by the server's own count, and seconds to the first chunk of
    text."""
    body = json.dumps(
        {
            "model": MODEL,
            "prompt": prompt_ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    began = time.perf_counter()
    writer.write(head.encode() + body)
    first_s, received = 0.0, b""
    while block := await reader.read(1 << 16):
        if not first_s and b"data: " in block:
            first_s = time.perf_counter() - began
        received += block
    writer.close()
    usage = re.search(rb'"completion_tokens":\s*(\d+)', received)
    if usage is None:
        raise RuntimeError(f"no usage in the answer: {received[-500:]!r}")
    return int(usage[1]), first_s


def together_s(port: int, wanted: Prompts) -> float:
    """Wall seconds of 16 streams at once; checks that every token was counted."""

    async def together() -> list[tuple[int, float]]:
        return await asyncio.gather(*(stream(port, row, TOKENS) for row in wanted))

    began = time.perf_counter()
    counts = [tokens for tokens, _ in asyncio.run(together())]
    seconds = time.perf_counter() - began
    if counts != [TOKENS] * len(wanted):
        raise RuntimeError(f"the server counted {counts} tokens, not {TOKENS} each")
    return seconds


def over_http(wanted: Prompts, offline_s: Callable[[], float]) -> dict[str, float]:
    """Start to first token, 16 streams at once beside 16 requests offline, in turn, and peak memory.

    The two are compared pair by pair: a shared machine's speed can change by a third within a minute.
    """
    server = Server()
    try:
        server.wait()
        asyncio.run(stream(server.port, wanted[0], 1))
        start_s = time.perf_counter() - server.began
        together_s(server.port, wanted)
        pairs = [(offline_s(), together_s(server.port, wanted)) for _ in range(2 * REPEATS + 1)]
        return {
            "start_to_first_token_s": start_s,
            "concurrent16_s": statistics.median(http for _, http in pairs),
            "overhead": 1.0 - statistics.median(offline / http for offline, http in pairs),
            "peak_rss_bytes": server.peak_rss_bytes(),
        }
    finally:
        server.stop()


# ---- the table


def measure() -> dict[str, Any]:
    """All figures of the docstring, and what they are made of under "details"."""
    cores = len(os.sched_getaffinity(0))
    with LLM(MODEL) as llm:
        wanted = prompts(llm)
        ours = offline(llm, wanted)
        prefix = prefix_ttft(llm)
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        tokens_prompts = [{"prompt_token_ids": row} for row in wanted]
        http = over_http(wanted, lambda: median_s(lambda: llm.generate(tokens_prompts, params), 1))
    theirs = reference(wanted, sorted({max(1, cores - 1), cores}))
    if ours["outputs"] != theirs["outputs"]:
        raise RuntimeError("greedy ids differ from transformers': the times mean nothing")
    return {
        "single_stream_ratio": theirs["single_s"] / ours["single_s"],
        "concurrent16_vs_sequential": theirs["sequential_s"] / ours["concurrent16_s"],
        "concurrent16_vs_batch16": theirs["batch16_s"] / ours["concurrent16_s"],
        "prefix_ttft_ratio": prefix["second_ms"] / prefix["first_ms"],
        "http_overhead": http["overhead"],
        "start_to_first_token_s": http["start_to_first_token_s"],
        "peak_rss_bytes": http["peak_rss_bytes"],
        "details": {
            "cores": cores,
            "tokens_per_s": {
                "single": TOKENS / ours["single_s"],
                "concurrent16": REQUESTS * TOKENS / ours["concurrent16_s"],
                "http16": REQUESTS * TOKENS / http["concurrent16_s"],
                "transformers_single": TOKENS / theirs["single_s"],
                "transformers_sequential16": REQUESTS * TOKENS / theirs["sequential_s"],
                "transformers_batch16": REQUESTS * TOKENS / theirs["batch16_s"],
            },
            "prefix": prefix,
            "transformers": {key: theirs[key] for key in ("version", "best", "settings")},
        },
    }


def held(name: str, value: float) -> bool:
    """Does the figure keep to its limit?"""
    sign, limit = LIMITS[name]
    return value >= limit if sign == ">=" else value <= limit


def main() -> int:
    """Prints the figures; exit status 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference:
        run_reference(json.loads(arguments.reference))
        return 0
    figures = measure()
    for name, (sign, limit) in LIMITS.items():
        verdict = "holds" if held(name, figures[name]) else "MISSED"
        print(f"{name:28} {figures[name]:14.3f}  {sign} {limit:<12g} {verdict}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures))
    return 0 if all(held(name, figures[name]) for name in LIMITS) else 1


if __name__ == "__main__":
    sys.exit(main())
