"""Where memory goes: what a model will need beside weights and caches, estimated before anything is loaded,
and what was really taken, measured when the engine is ready.

    workspace   buffers between the launches (counted), and what one step of max_batch_tokens makes besides:
                four times the hidden states, the widest layer's products, queries and attention's outputs,
                and the logits of max_running_requests twice, and what drawing from them needs
    graphs      4 KiB a node, 12 nodes a layer, a graph for each batch size; and the logits that all share
    loader      the largest weight twice: as it is read, and as it is rearranged. Gone when the cache comes

Prompt logprobs make more logits than are planned with: those of a whole chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from firebox.engine.budget import MemoryLine, Resolved
from firebox.engine.messages import Memory
from firebox.hardware.base import Gpu
from firebox.hardware.probe import forget_gpu_peak, gpu_memory, resident_bytes
from firebox.kernels._blocks import HEAD
from firebox.layers.decoder import Decoder

if TYPE_CHECKING:  # Triton is imported where there is a GPU, and not before
    from firebox.layers.launches import Layers

LAUNCHES_A_LAYER, BYTES_A_NODE = 12, 4096
GRAPHS, WORKSPACE, LOADER, RESERVE, ALL = "graphs", "workspace", "loader peak", "reserve", "all"
FLOAT32 = 4


@dataclass(frozen=True)
class Needs:
    """Bytes; see above."""

    workspace: int = 0
    graphs: int = 0
    loader: int = 0


def needs(
    model: Decoder, layers: Sequence[Layers], gpu: Gpu, slots: Sequence[int], *, tokens: int, rows: int,
    graphs: bool,
) -> Needs:  # fmt: skip
    """Of steps of up to `tokens` tokens and `rows` requests. `slots`: bytes of each weight; `graphs`: decode
    steps are captured."""
    from firebox.engine.gpu_sampler import scratch_bytes
    from firebox.layers.launches import workspace_bytes

    logits = model.head.vocab * FLOAT32
    workspace = workspace_bytes(layers, gpu, tokens) + tokens * token_bytes(model, layers) + 2 * rows * logits
    workspace += scratch_bytes(model.head.vocab, gpu, rows)
    captured = graph_nodes_bytes(rows, len(model.blocks)) + rows * logits
    return Needs(workspace, captured if graphs else 0, 2 * max(slots, default=0))


def graph_nodes_bytes(graphs: int, layers: int) -> int:
    """What the driver keeps of so many graphs."""
    return graphs * layers * LAUNCHES_A_LAYER * BYTES_A_NODE


def token_bytes(model: Decoder, layers: Sequence[Layers]) -> int:
    """What a token needs in the widest layer, the residual stream included."""
    from firebox.layers.launches import SAMPLING

    table = model.embedding.weight
    blocks = [alike for alike in layers if alike.op not in (HEAD, SAMPLING)]
    widest = max((sum(map(_made_bytes, alike.operations)) for alike in blocks), default=0)
    return 4 * table.shape[1] * table.itemsize + widest


def _made_bytes(operation: Any) -> int:
    """What an operation writes of a token and does not keep in a workspace."""
    p = operation.problem
    if hasattr(p, "key_dim"):  # of a gated delta net; its states and scratch are counted elsewhere
        return int(p.heads * p.value_dim * 2)
    if hasattr(p, "value_dim"):
        return int(p.heads * (p.head_dim + p.value_dim) * p.dtype.itemsize)
    if hasattr(p, "out_dtype") and not p.residual:
        return int(p.rows) * (FLOAT32 if p.out_dtype == "f32" else 2)
    return 0


# ---- what was taken


class Meter:
    """Ascribes memory to what took it: on a GPU as torch's allocator counts it, on a CPU only in all."""

    def __init__(self, gpu: Gpu) -> None:
        self._cuda = gpu.kind == "cuda"
        self._found: dict[str, int] = {}
        self._first = self._used()
        self._last = gpu_memory().allocated_bytes if self._cuda else 0
        if self._cuda:
            forget_gpu_peak()  # an engine before this one in its process

    def took(self, what: str, peak: str | None = None) -> None:
        """What is held now and was not at the last call; `peak`: what was held in between and no longer."""
        if not self._cuda:
            return
        now = gpu_memory()
        self._found[what] = now.allocated_bytes - self._last
        if peak is not None:
            self._found[peak] = now.peak_bytes - now.allocated_bytes
        self._last = now.allocated_bytes
        forget_gpu_peak()

    def moves(self, size: int, source: str, target: str) -> None:
        """So many bytes of `source` are `target`'s."""
        if self._cuda:
            self._found[source] -= size
            self._found[target] = self._found.get(target, 0) + size

    def beside(self, settings: Resolved, note: str) -> list[Memory]:
        """The budget's lines with what was measured of each; `note`: on the line of graphs."""
        lines = [self._line(line, note) for line in settings.memory]
        planned = sum(line.bytes for line in settings.memory if line.what not in (LOADER, RESERVE))
        why = "free memory that is gone" if self._cuda else "resident memory of the engine process"
        return [*lines, Memory(ALL, planned, self._used() - self._first, why)]

    def _line(self, line: MemoryLine, note: str) -> Memory:
        why = f"{line.why}; {note}" if line.what == GRAPHS and note else line.why
        return Memory(line.what, line.bytes, self._found.get(line.what), why)

    def _used(self) -> int:
        return -gpu_memory().free_bytes if self._cuda else resident_bytes()
