"""The engine on one NVIDIA GPU: decode and prefill of a card's real shapes with random weights, no server.

    PYTHONPATH=src:. python benchmarks/engine.py gpt-oss-120b [--batches 1,8,64,256] [--prompt 128] [--tokens 256]
        [--layers N] [--json]

A batch's ms/token is (time of the last token − time of the first) / (tokens − 1), greedy, all requests admitted
at once; `of_roof` is the bytes of weights that a step reads (experts as often as uniform routing touches
them) and of keys and values, over the GPU's copy rate, over that time. Before a figure counts, the routing of one decode step is
looked at: the distinct experts per layer against E · (1 − (1 − k/E)^batch).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from firebox.config import Config, EngineConfig, ModelConfig
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.start import start
from firebox.text.folder import resolve_folder


def cut(folder: Path, layers: int | None) -> Path:
    """The model's folder, or another with a config.json of fewer layers and no MTP layer."""
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config", config)
    inner.pop("num_nextn_predict_layers", None)
    inner["num_hidden_layers"] = min(layers or 10**6, inner["num_hidden_layers"])
    if "layer_types" in inner:
        inner["layer_types"] = inner["layer_types"][: inner["num_hidden_layers"]]
    made = Path(tempfile.mkdtemp())
    (made / "config.json").write_text(json.dumps(config))
    return made


def requests(batch: int, prompt: int, tokens: int, vocab: int, first_id: int) -> list[Request]:
    generator = torch.Generator().manual_seed(first_id)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    ids = torch.randint(5, vocab, (batch, prompt), generator=generator).tolist()
    return [Request(first_id + i, list(row), params) for i, row in enumerate(ids)]


def serve(scheduler: Any, runner: Any, batch: list[Request]) -> tuple[float, float]:
    """Seconds to the last first token, and a token of decode after it."""
    for request in batch:
        scheduler.add(request)
    began, first, last, steps = time.perf_counter(), 0.0, 0.0, 0
    while (plan := scheduler.plan()) is not None:
        decode = all(chunk.count == 1 for chunk in plan.chunks) and len(plan.chunks) == len(batch)
        scheduler.apply(plan, runner.run(plan))
        now = time.perf_counter()
        if not decode:
            first = now
        else:
            last, steps = now, steps + 1
    return first - began, (last - first) / max(1, steps)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    batches = [int(b) for b in arguments.batches.split(",")]
    began = time.perf_counter()
    folder = cut(resolve_folder(arguments.model), arguments.layers)
    model = ModelConfig(model=str(folder), load_format="dummy", dtype="bfloat16")
    engine = EngineConfig(
        max_running_requests=max(batches), max_batch_tokens=8192, prefill_chunk_tokens=8192, page_tokens=64,
        context_length=4096, prefix_cache=False, device="cuda", cuda_graph="off" if arguments.eager else "decode",
    )  # fmt: skip
    scheduler, runner, ready = start(Config(model=model, engine=engine))
    print(
        f"{arguments.model} ready after {time.perf_counter() - began:.1f} s, "
        f"{torch.cuda.memory_allocated() / 1e9:.1f} GB",
        flush=True,
    )
    for row in ready.ledger:
        print("  ", row.op, row.kernel, row.why, flush=True)
    rows, vocab, first_id = [], ready.vocab_size, 1
    for batch in batches:
        serve(scheduler, runner, requests(batch, arguments.prompt, 8, vocab, first_id))
        first_id += batch
        times = []
        for _ in range(2):
            times.append(
                serve(scheduler, runner, requests(batch, arguments.prompt, arguments.tokens, vocab, first_id))
            )
            first_id += batch
        ttft, per_token = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {"batch": batch, "ms_per_token": round(per_token * 1e3, 3), "prefill_ms": round(ttft * 1e3, 1)}
        )
        print(json.dumps(rows[-1]), flush=True)
    print("steps", dict(runner.steps))
    if arguments.profile:
        profile(scheduler, runner, vocab, first_id)
    if arguments.json:
        print(json.dumps(rows))
    return 0


def profile(scheduler: Any, runner: Any, vocab: int, first_id: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        serve(scheduler, runner, requests(1, 128, 16, vocab, first_id))
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=60))


if __name__ == "__main__":
    sys.exit(main())
