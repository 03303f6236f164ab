"""The speed that memory bandwidth allows at decode: what one GPU must read in a step, over what it can read
in a second.

    weights   everything that a step reads once, whatever the batch, and of E routed experts of which a token
              takes k, at batch B, the expected share of distinct ones: 1 − (1 − k / E)^B
    cache     for each request its keys and values at `context_tokens`, and its recurrent states, read and
              written

Routing is taken as uniform. With tensor parallelism every GPU reads its own share, at the same time;
communication costs nothing here, nor does anything else, so no server is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firebox.errors import ConfigError
from firebox.formats.base import WeightSlot
from firebox.hardware.base import Gpu
from firebox.planning._parts import Part
from firebox.planning.memory import CacheBytes

BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class StepBytes:
    """What one GPU reads in one decode step, and for recurrent states writes."""

    weights: float
    cache: int

    @property
    def total(self) -> float:
        """Both."""
        return self.weights + self.cache


@dataclass(frozen=True)
class Roof:
    """`steps`: batch → its bytes on one of `gpus`; `bandwidth_gb_s` of one GPU: measured reading, or the
    datasheet's."""

    bandwidth_gb_s: float
    measured: bool
    context_tokens: int
    gpus: int
    steps: Mapping[int, StepBytes]

    @property
    def bytes_per_token(self) -> float:
        """What one GPU reads for a token at batch 1."""
        return self.steps[1].total

    def tokens_per_s(self, batch: int) -> float:
        """All requests of the batch together."""
        return batch * self.bandwidth_gb_s * 1e9 / self.steps[batch].total

    def weights_only_tokens_per_s(self, batch: int) -> float:
        """The same with an empty cache."""
        return batch * self.bandwidth_gb_s * 1e9 / self.steps[batch].weights

    def document(self) -> dict[str, Any]:
        """As `firebox fit --json` prints it; bytes of one GPU."""
        batches = self.steps
        return {
            "bytes_per_token": round(self.bytes_per_token),
            "tokens_per_s": {str(b): round(self.tokens_per_s(b), 1) for b in batches},
            "weights_only_tokens_per_s": {
                str(b): round(self.weights_only_tokens_per_s(b), 1) for b in batches
            },
            "weights_bytes_per_step": {str(b): round(step.weights) for b, step in batches.items()},
            "cache_bytes_per_step": {str(b): step.cache for b, step in batches.items()},
            "context_tokens": self.context_tokens,
            "bandwidth_gb_s": self.bandwidth_gb_s,
            "bandwidth": self.source,
            "assumes": f"uniform routing; {self.gpus} GPUs read their shares at once; communication is free",
        }

    @property
    def source(self) -> str:
        """Where the bandwidth comes from."""
        return "measured reading" if self.measured else "datasheet; no measurement yet"


def roof(
    parts: Sequence[Part], cache: CacheBytes, gpu: Gpu, tp: int, context_tokens: int, ep: int = 1
) -> Roof:
    """The roof of one of the GPUs of kernels.plan.Setting. Raises ConfigError for a GPU whose bandwidth is
    not known."""
    bandwidth = gpu.read_gb_s or gpu.bandwidth_gb_s
    if bandwidth is None:
        raise ConfigError(f"the memory bandwidth of {gpu.name} is not known")
    in_window = min(context_tokens, cache.window_tokens) * cache.per_window_token
    per_request = context_tokens * cache.per_token + in_window + 2 * cache.state
    groups = max(1, ep // tp)  # which share out the requests
    steps = {b: StepBytes(weights_bytes(parts, tp, b, ep), -(-b // groups) * per_request) for b in BATCHES}
    return Roof(bandwidth, gpu.read_gb_s is not None, context_tokens, max(tp, ep), steps)


def weights_bytes(parts: Sequence[Part], tp: int, batch: float, ep: int = 1) -> float:
    """What one GPU reads of the weights in a decode step of `batch` requests, or, with drafts, of so many
    tokens. What widths are grown by is not counted, nor that some GPU's experts are chosen more often."""
    return sum(part.shard_bytes(tp, ep) * _share(part, batch) for part in parts if part.read)


def matrix_s(parts: Sequence[Part], gpu: Gpu) -> float | None:
    """Seconds that one GPU's matrix units need for a prompt token: two operations for each weight it meets,
    at the rate of the weight's width. Attention between tokens is left out, and the output matrix, which only
    a prompt's last token meets. None where a rate is not known."""
    seconds = 0.0
    for part in parts:
        if part.name in ("embedding", "head") or not part.read:
            continue
        for slot, count in part.slots:
            if not isinstance(slot, WeightSlot):
                continue
            rate = _tflop_s(slot.format.name, gpu)
            if rate is None:
                return None
            seconds += 2 * count * slot.target.numel() * _share(part, 1) / (rate * 1e12)
    return seconds


def _tflop_s(format: str, gpu: Gpu) -> float | None:
    """The fastest that weights of this format can be multiplied: with activations as narrow as they are."""
    rates = [gpu.bf16_tflop_s]
    if format != "bf16":
        rates.append(gpu.fp8_tflop_s)
        if not format.startswith("fp8"):
            rates.append(gpu.fp4_tflop_s)
    return max((rate for rate in rates if rate is not None), default=None)


def _share(part: Part, batch: float) -> float:
    """Of this part's weights that a step is expected to read."""
    if part.block is None:
        return 1.0
    problem = part.block.problem
    missed: float = (1.0 - problem.top_k / problem.experts) ** batch
    return 1.0 - missed
