"""Requests of every kind through the runner of a GPU, on the CPU: graphs are replayed by running their step
again (replayed.py), tokens and logprobs come from the GPU's kernels under Triton's interpreter. The model is
a table: logits are a function of a token and its position. Prints as JSON what each request got, what the
CPU's runner gives it, and how the steps ran.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_drawing [refused]

"refused": under --strict, with a capture that fails for three requests.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.engine import gpu_runner
from firebox.engine.messages import Delta, SamplingParams
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Scheduler
from firebox.hardware.base import find_gpu
from tests.support import quick_interpreter
from tests.support.replayed import Replayed, replayed_runner

VOCAB, PAGE_TOKENS, TOKENS = 300, 16, 3
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.9},
    "top_k": {"temperature": 0.8, "top_k": 3},
    "top_p and min_p": {"temperature": 1.2, "top_p": 0.7, "min_p": 0.05},
    "logprobs": {"temperature": 0.7, "top_k": 9, "logprobs": 3},
    "chosen alone": {"temperature": 0.0, "logprobs": 0},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.7, "presence_penalty": 0.5, "top_p": 0.8},
    "bias and prompt": {"temperature": 0.0, "logit_bias": {7: 30.0}, "prompt_logprobs": 2},
}
TOGETHER = (("greedy", "temperature"), ("top_k", "greedy", "top_p and min_p"), tuple(KINDS))


@dataclasses.dataclass(frozen=True)
class Paged:
    page_table: torch.Tensor
    context_tokens: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Plan:
    paged: Paged


class Backend:
    """Plans nothing, but as a graph's would."""

    refill = None

    @staticmethod
    def plan(query_start: Any, contexts: Any, table: torch.Tensor, context_bound: int = 0) -> Plan:
        return Plan(Paged(table, torch.from_numpy(contexts)))


class Table:
    """logits = rows of one table by the token + rows of another by its position."""

    cache_specs = ()
    attention_backend = Backend
    not_capturable = ""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self._by_token = 2 * torch.randn(VOCAB, VOCAB, generator=generator)
        self._by_position = 2 * torch.randn(64, VOCAB, generator=generator)

    def __call__(self, token_ids: torch.Tensor, step: Any) -> torch.Tensor:
        return self._by_token[token_ids] + self._by_position[step.positions]

    def logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return x if out is None else out.copy_(x)


class Ends(Replayed):
    """A capture for three requests finds no memory."""

    def __init__(self, rows: int, *arguments: Any) -> None:
        if rows == 3:
            raise RuntimeError("out of memory, as planned")
        super().__init__(rows, *arguments)


def answers(runner: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    cache = KVCache(CacheSizes(64, PAGE_TOKENS, None, 0, 0), False)
    scheduler = Scheduler(
        cache, max_running_requests=8, max_batch_tokens=64, prefill_chunk_tokens=64, eos_token_ids=frozenset()
    )
    deltas: dict[int, list[Delta]] = {}
    for i, kind in enumerate(kinds):
        params = SamplingParams(max_tokens=TOKENS, seed=11 + i, ignore_eos=True, **KINDS[kind])
        scheduler.add(Request(i, [5 + i, 70, 9], params))
    pipeline = Pipeline(scheduler, runner, goes_on=True)
    while (done := pipeline.step()) is not None:
        for delta in done[1]:
            deltas.setdefault(delta.request_id, []).append(delta)
    return {kind: _said(deltas[i]) for i, kind in enumerate(kinds)}


def _said(deltas: list[Delta]) -> dict[str, Any]:
    prompt = deltas[0].prompt_logprobs
    return {
        "ids": [token_id for delta in deltas for token_id in delta.ids],
        "logprobs": [_row(row) for delta in deltas for row in delta.logprobs or []],
        "prompt": None if prompt is None else [row and _row(row) for row in prompt],
        "error": deltas[-1].error,
    }


def _row(row: Any) -> list[Any]:
    return [row.token_id, row.logprob, row.rank, row.top_ids, row.top_logprobs]


def main(option: str = "") -> None:
    quick_interpreter.begin()
    gpu = find_gpu("gb10")
    model: Any = Table()
    device = replayed_runner(model, (), PAGE_TOKENS, gpu, VOCAB, draws=True, strict=option == "refused")
    if option == "refused":
        gpu_runner.DecodeGraph = Ends  # type: ignore[misc]
    oracle = Runner(model, (), PAGE_TOKENS, frozenset(), CPU)
    found = []
    for kinds in TOGETHER[1:2] if option == "refused" else TOGETHER:
        before, ahead = dict(device.steps), device.ahead
        row = {"found": answers(device, kinds), "wanted": answers(oracle, kinds)}
        row["steps"] = {"/".join(mode): n - before.get(mode, 0) for mode, n in device.steps.items()}
        row["ahead"] = device.ahead - ahead
        found.append(row)
    captured = [[graph.requests, graph.error] for graph in device.news()]
    print(json.dumps({"rows": found, "captured": captured, "none left": device.news() == []}))


if __name__ == "__main__":
    main(*sys.argv[1:])
