"""`firebox bench` beside llama-benchy on one server: the bundled model's on this machine, or any other.

    pip install --no-deps --target /tmp/llama-benchy llama-benchy==0.4.0 tabulate
    python -m tools.agree_with_llama_benchy --llama-benchy /tmp/llama-benchy [--rounds 8] [--url URL]

Both send chats with prompts and answers of the same length, cut from the same text, and take turns at going
first, so that what else runs on the machine meets both alike; the server has half of the cores for itself, so
that a heavier client does not slow it down. Compared are decode tokens per second (llama-benchy's tg t/s) and
the time to the first content (its e2e TTFT, our TTFT), by the median over rounds of the ratio within a round.
Exit 1 if any is more than 5 % from 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from firebox.bench.measure import Settings, measure
from firebox.bench.prompts import corpus
from firebox.text.folder import bundled

TEXT = "http://127.0.0.1/firebox-sources"  # never fetched: the text lies in llama-benchy's cache
LIMIT = 0.05
TRIES = 10


@contextlib.contextmanager
def serving() -> Iterator[str]:
    command = [sys.executable, "-m", "firebox", "serve", "--port", "0", "--threads", "1"]
    cores = sorted(os.sched_getaffinity(0))
    servers, clients = (
        (cores[: len(cores) // 2], cores[len(cores) // 2 :]) if len(cores) > 1 else (cores, cores)
    )
    os.sched_setaffinity(0, servers)  # the process to be started inherits it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, clients)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"at (http://\S+)$", line):
                yield found[1]
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait(30)


def ours(url: str, concurrency: int, prompt: int, output: int, runs: int) -> dict[str, float]:
    choices = {
        "concurrency": (concurrency,),
        "prompt_tokens": (prompt,),
        "output_tokens": (output,),
        "requests": 1,
        "repeat": runs,
    }
    for _ in range(TRIES):  # the bundled model loops now and then, and such a row has no number
        [row] = measure(Settings(url=url, profile="concurrency", choices=choices, chat=True)).rows
        if row.ttft_ms is not None and row.decode_tok_s is not None:
            return {"tg t/s": row.decode_tok_s, "TTFT ms": row.ttft_ms["mean"]}
    raise SystemExit(f"no number: {row.verdict}: {row.why}")


def theirs(place: Path, url: str, concurrency: int, prompt: int, output: int, runs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as home:
        cache = Path(home) / ".cache" / "llama-benchy"
        cache.mkdir(parents=True)
        (cache / f"{hashlib.md5(TEXT.encode()).hexdigest()}.txt").write_text(corpus())
        result = Path(home) / "result.json"
        command = [sys.executable, "-m", "llama_benchy", "--base-url", f"{url}/v1", "--model", "firebox-tiny"]
        command += ["--tokenizer", str(bundled()["firebox-tiny"]), "--book-url", TEXT, "--skip-coherence"]
        command += [
            "--pp",
            str(prompt),
            "--tg",
            str(output),
            "--runs",
            str(runs),
            "--exact-tg",
        ]
        command += ["--concurrency", str(concurrency), "--save-result", str(result), "--format", "json"]
        environment = {**os.environ, "PYTHONPATH": str(place), "HOME": home, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        [found] = json.loads(result.read_text())["benchmarks"]
    return {"tg t/s": found["tg_throughput"]["mean"], "TTFT ms": found["e2e_ttft"]["mean"]}


def pair(
    place: Path, url: str, load: tuple[int, int, int, int], ours_first: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """One round: both, one right after the other."""
    if ours_first:
        return ours(url, *load), theirs(place, url, *load)
    after = theirs(place, url, *load)
    return ours(url, *load), after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--llama-benchy", type=Path, required=True)
    parser.add_argument("--url")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--concurrency", default="1,2,4")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=512)
    arguments = parser.parse_args()
    apart = False
    with contextlib.nullcontext(arguments.url) if arguments.url else serving() as url:
        for concurrency in map(int, arguments.concurrency.split(",")):
            load = (concurrency, arguments.prompt, arguments.output, arguments.runs)
            pairs = [
                pair(arguments.llama_benchy, url, load, number % 2 == 0) for number in range(arguments.rounds)
            ]
            for name in pairs[0][0]:
                a, b = (statistics.median(pair[i][name] for pair in pairs) for i in (0, 1))
                ratio = statistics.median(pair[0][name] / pair[1][name] for pair in pairs)
                apart |= abs(ratio - 1) > LIMIT
                both = f"firebox {a:9.2f}  llama-benchy {b:9.2f}  median ratio {ratio - 1:+.1%}"
                print(f"concurrency {concurrency}  {name:8} {both}", flush=True)
    return int(apart)


if __name__ == "__main__":
    sys.exit(main())
