"""The engine on one NVIDIA GPU: decode and prefill of a card's real shapes with random weights, no server.

    PYTHONPATH=src:. python benchmarks/engine.py gpt-oss-120b [--batches 1,8,64,256] [--prompt 128]
        [--tokens 256] [--layers N] [--ttft 2048] [--no-overlap] [--profile] [--json]

ms_per_token: the median time between two steps in which every request of the batch gets one token, greedy,
host work and the tokens' way to the host included. replay_ms: the same step's graph alone. of_roof: the bytes
of weights that such a step reads (of E experts the share 1 − (1 − k/E)^batch) over the GPU's copy rate, over
ms_per_token. Before a figure counts, one step's routing is looked at: `experts` are the distinct ones of a
layer, on average over layers, `expected` what uniform routing gives; a fill that sends all tokens one way
would be void.
"""

from __future__ import annotations

import argparse
import itertools
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
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.start import start
from firebox.layers.experts import Experts
from firebox.layers.moe import MoeBlock
from firebox.planning._parts import Source, open_source
from firebox.planning.roof import weights_bytes
from firebox.text.folder import resolve_folder
from firebox.weights.checkpoint import open_checkpoint


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


def parts_of(folder: Path, runner: Any) -> Any:
    """The model's weights as the planner counts them."""
    checkpoint = open_checkpoint(folder)
    source = Source(str(folder), checkpoint.model_type, checkpoint.text_config, "bfloat16")
    return open_source(source, runner.gpu).parts


def requests(batch: int, prompt: int, tokens: int, vocab: int, first_id: int) -> list[Request]:
    generator = torch.Generator().manual_seed(first_id)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    ids = torch.randint(5, vocab, (batch, prompt), generator=generator).tolist()
    return [Request(first_id + i, list(row), params) for i, row in enumerate(ids)]


def serve(scheduler: Any, runner: Any, batch: list[Request]) -> tuple[float, list[float]]:
    """Seconds to the first token of all, and of each step that decodes the whole batch."""
    for request in batch:
        scheduler.add(request)
    began = before = time.perf_counter()
    first, steps, pipeline = 0.0, [], Pipeline(scheduler, runner)
    while (done := pipeline.step()) is not None:
        ended, chunks = time.perf_counter(), done[0].chunks
        if all(chunk.count == 1 for chunk in chunks):
            first = first or before
            if len(chunks) == len(batch):
                steps.append(ended - before)
        before = ended
    return (first or before) - began, steps


def distinct_experts(scheduler: Any, runner: Any, batch: list[Request]) -> float | None:
    """Of a layer, in one decode step, on average over the layers; None without experts."""
    found, call = [], Experts.__call__

    def counted(self: Experts, x: Any, expert_ids: torch.Tensor, *rest: Any) -> None:
        if expert_ids.shape[0] == len(batch):
            found.append(expert_ids[:, : self.problem.top_k].unique().numel())
        call(self, x, expert_ids, *rest)

    why, runner._why_eager, Experts.__call__ = runner._why_eager, "looked at", counted
    serve(scheduler, runner, batch)
    runner._why_eager, Experts.__call__ = why, call
    return statistics.mean(found) if found else None


def replay_ms(runner: Any, batch: int) -> float | None:
    """Of a batch's graph by itself, the last step again and again."""
    graph = runner._graphs.get(batch)
    if graph is None:
        return None
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        graph._graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / 20 * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ttft", type=int, default=2048)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    batches = [int(b) for b in arguments.batches.split(",")]
    began = time.perf_counter()
    folder = cut(resolve_folder(arguments.model), arguments.layers)
    model = ModelConfig(model=str(folder), load_format="dummy", dtype="bfloat16")
    engine = EngineConfig(
        max_running_requests=max(batches), max_batch_tokens=8192, prefill_chunk_tokens=8192, page_tokens=64,
        context_length=4096, prefix_cache=False, device="cuda",
        cuda_graph="off" if arguments.eager else "decode", overlap=not arguments.no_overlap,
    )  # fmt: skip
    scheduler, runner, ready = start(Config(model=model, engine=engine))
    print("\n".join(ready.reasons))
    print(
        f"{arguments.model} ready after {time.perf_counter() - began:.1f} s, "
        f"{torch.cuda.memory_allocated() / 1e9:.1f} GB",
        flush=True,
    )
    for row in ready.ledger:
        print("  ", row.op, row.kernel, row.why, flush=True)
    problems = [mlp.problem for _, mlp in runner.model.blocks if isinstance(mlp, MoeBlock)]
    parts = parts_of(folder, runner)
    rows, vocab, first_id = [], ready.vocab_size, 1

    def some(batch: int, tokens: int, prompt: int = arguments.prompt) -> list[Request]:
        nonlocal first_id
        first_id += batch
        return requests(batch, prompt, tokens, vocab, first_id)

    for batch in batches:
        seen = distinct_experts(scheduler, runner, some(batch, 4))
        serve(scheduler, runner, some(batch, 8))
        ttft, steps = serve(scheduler, runner, some(batch, arguments.tokens))
        ms, floor = (
            statistics.median(steps or [float("nan")]) * 1e3,
            weights_bytes(parts, 1, batch) / runner.gpu.copy_gb_s / 1e6,
        )
        row = {"batch": batch, "ms_per_token": round(ms, 3), "replay_ms": replay_ms(runner, batch)}
        row |= {
            "floor_ms": round(floor, 2),
            "of_roof": round(floor / ms, 3),
            "prefill_ms": round(ttft * 1e3, 1),
        }
        if problems and seen is not None:
            e, k = problems[0].experts, problems[0].top_k
            row |= {"experts": round(seen, 1), "expected": round(e * (1 - (1 - k / e) ** batch), 1)}
        row["steps"] = len(steps)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.ttft:
        times = [serve(scheduler, runner, some(1, 2, arguments.ttft))[0] for _ in range(4)]
        print(
            f"first token of {arguments.ttft} after {statistics.median(times[1:]) * 1e3:.1f} ms", flush=True
        )
    print("steps", dict(runner.steps))
    for batch in batches if arguments.profile else ():
        profile(runner, batch)
    if arguments.json:
        print(json.dumps(rows))
    return 0


def profile(runner: Any, batch: int) -> None:
    """Where a step's time goes: from the end of one kernel to the end of the next, by name, of one replay."""
    graph = runner._graphs[batch]._graph
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted(
        (event.time_range.end, event.name) for event in found.events() if event.device_type.name == "CUDA"
    )
    of_name: dict[str, list[float]] = {}
    for (before, _), (end, name) in itertools.pairwise(events):
        of_name.setdefault(name[:48], []).append(end - before)
    print(f"batch {batch}: {events[-1][0] - events[0][0]:.0f} us, {len(events)} kernels")
    for name, us in sorted(of_name.items(), key=lambda pair: -sum(pair[1]))[:16]:
        print(f"  {name:50} {len(us):5} x {statistics.mean(us):8.2f} us = {sum(us):9.1f} us")


if __name__ == "__main__":
    sys.exit(main())
