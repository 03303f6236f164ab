"""The launches of a model on one GPU: for every number of tokens which kernels run and at which
configuration, compiled for that GPU and read back.

    layers_of(model, setting)             the model's layers, those that are alike together
    rows(layers, gpu, max_tokens)         every launch that 1 … max_tokens tokens can make
    choices(layers, gpu, max_tokens)      what they choose, and why nothing else
    launches(layers, gpu, max_tokens)     the same, compiled: for `fit`, and for an engine before it loads

What a layer launches it says itself (`operations`); what an operation launches, the module that does it
(kernels/plan.py). Imports Triton; compiles nothing before `launches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from firebox.hardware.base import Gpu
from firebox.kernels import logprobs, sample
from firebox.kernels._blocks import ATTENTION_BLOCK, DENSE_BLOCK, HEAD, MOE_BLOCK
from firebox.kernels.compile import Compiled, CompileRequest, compile_all, limit_bytes
from firebox.kernels.plan import CUBLAS, Chosen, Operation, Planned, Setting, Variants, chosen, planned
from firebox.layers import (
    delta_gpu,
    dense_gpu,
    embedding,
    expert_paths,
    experts,
    gated_delta,
    latent_attention,
    route_gpu,
)
from firebox.layers.attention import AttentionBlock
from firebox.layers.decoder import Decoder
from firebox.layers.dense import DenseBlock
from firebox.layers.device import tensor_bytes
from firebox.layers.gated_delta import GatedDeltaBlock
from firebox.layers.latent_attention import LatentAttentionBlock
from firebox.layers.moe import MoeBlock

NO_TENSOR_CORE = "none"
UNQUANTISED, WIDE = "bf16", {"bf16", "f16"}  # a format of weights; what tensor instructions multiply
SAMPLING = "sampling"
OPS = {
    AttentionBlock: ATTENTION_BLOCK,
    MoeBlock: MOE_BLOCK,
    DenseBlock: DENSE_BLOCK,
    LatentAttentionBlock: latent_attention.OP,
    GatedDeltaBlock: gated_delta.OP,
}


@dataclass(frozen=True)
class Layers:
    """`layers` layers that are alike; `op` as the ledger names them. `refusal`: why no kernels run them;
    there are then no operations. `format`: of their weights."""

    op: str
    layers: int
    format: str
    operations: tuple[Operation, ...] = ()
    refusal: str | None = None


@dataclass(frozen=True)
class Launch:
    """One launch of a model, and what became of its compile; None for a library's kernel."""

    layers: Layers
    planned: Planned
    compiled: Compiled | None
    limit_bytes: int

    @property
    def fits(self) -> bool:
        """It compiles within the limit; of a library's kernel that is taken for granted."""
        return self.compiled is None or self.compiled.fits

    @property
    def emulated(self) -> bool:
        """It is written for a tensor instruction that the compiler did not use."""
        request = self.planned.request
        return bool(request and request.declares) and self.compiled is not None and not self.compiled.native

    @property
    def weight_only(self) -> bool:
        """Its weights are stored narrower than what its tensor instruction multiplies."""
        request, problem = self.planned.request, self.planned.operation.problem
        narrow = getattr(problem, "format", UNQUANTISED) != UNQUANTISED
        return narrow and request is not None and not WIDE.isdisjoint(request.declares)

    @property
    def where(self) -> str:
        """Which launch this is, in words."""
        planned = self.planned
        return (
            f"{self.layers.op}, {planned.operation.name}: {planned.op} at {planned.first} to "
            f"{planned.last} tokens"
        )

    @property
    def misfit(self) -> str | None:
        """Why it cannot run on this GPU, with the numbers; None if it can."""
        if self.compiled is None or self.fits:
            return None
        compiled = self.compiled
        return compiled.error or f"{compiled.shared_bytes} bytes of shared memory of {compiled.limit_bytes}"

    @property
    def problem(self) -> str | None:
        """The same, and which launch it is."""
        return f"{self.where}: {self.misfit}" if self.misfit else None

    @property
    def emulation(self) -> str | None:
        """Which tensor instruction it does without, and what it runs; None if it uses its own."""
        request = self.planned.request
        if not self.emulated or request is None or self.compiled is None:
            return None
        wanted = " and ".join(request.declares)
        return f"{self.where} is written for {wanted} and runs {self.compiled.instruction}"

    def document(self) -> dict[str, Any]:
        """As `firebox fit --json` prints it."""
        planned, compiled = self.planned, self.compiled
        return {
            "layer": self.layers.op,
            "layers": self.layers.layers,
            "operation": planned.operation.name,
            "op": planned.op,
            "variant": planned.compile.variant,
            "kernel": compiled.kernel if compiled else CUBLAS,
            "format": planned.operation.format,
            "tokens": [planned.first, planned.last],
            "path": planned.path,
            "why": planned.why,
            "losers": dict(planned.losers),
            "config": planned.config,
            "shared_bytes": compiled.shared_bytes if compiled else 0,
            "limit_bytes": self.limit_bytes,
            "registers": compiled.registers if compiled else 0,
            "spill_bytes": compiled.spill_bytes if compiled else 0,
            "instruction": compiled.instruction if compiled else NO_TENSOR_CORE,
            "native": compiled.native if compiled else True,
            "weight_only": self.weight_only,
            "fits": self.fits,
            "error": compiled.error if compiled else None,
        }


def layers_of(model: Decoder, setting: Setting) -> tuple[Layers, ...]:
    """What one of `setting.tp` GPUs launches, which the weights' cuts allow, in the order of a step."""
    blocks = (block for pair in model.blocks for block in pair)
    found = [_layers(OPS[type(block)], block, setting) for block in blocks]
    begun = _layers(embedding.OP, model.embedding, setting)
    head = _layers(HEAD, model.head, setting)
    vocab = model.head.vocab
    drawn = (Variants("sample", "f32", sample, vocab), Variants("logprobs", "f32", logprobs, vocab))
    return (begun, *_counted(found), head, Layers(SAMPLING, 1, "f32", drawn))


def choices(layers: Iterable[Layers], gpu: Gpu, max_tokens: int) -> Iterator[tuple[Layers, Chosen]]:
    """What 1 … `max_tokens` tokens choose, of operations that have a choice."""
    made: dict[Operation, list[Chosen]] = {}
    for alike in layers:
        for operation in alike.operations:
            if operation not in made:
                made[operation] = chosen(operation, gpu, max_tokens)
            yield from ((alike, choice) for choice in made[operation] if choice.losers)


def rows(layers: Iterable[Layers], gpu: Gpu, max_tokens: int) -> Iterator[tuple[Layers, Planned]]:
    """Everything that can be launched for 1 … `max_tokens` tokens."""
    made: dict[Operation, list[Planned]] = {}
    for alike in layers:
        for operation in alike.operations:
            if operation not in made:
                made[operation] = planned(operation, gpu, max_tokens)
            yield from ((alike, row) for row in made[operation])


def launches(
    layers: Sequence[Layers], gpu: Gpu, max_tokens: int, *, keep_binaries: bool = False
) -> tuple[Launch, ...]:
    """The same, compiled. `keep_binaries`: for Launchers on this machine."""
    found = list(rows(layers, gpu, max_tokens))
    ours: list[CompileRequest] = [row.request for _, row in found if row.request is not None]
    results = iter(compile_all(ours, keep_binaries=keep_binaries))
    limit = limit_bytes(gpu)
    return tuple(
        Launch(alike, row, None if row.request is None else next(results), limit) for alike, row in found
    )


def workspace_bytes(layers: Sequence[Layers], gpu: Gpu, max_tokens: int) -> int:
    """What lies between the launches: one workspace for all linear layers, as large as the largest needs, one
    for all routers of one token, and one for each kind of expert layers and of gated delta nets. Layers that
    no kernel runs count nothing."""
    operations = dict.fromkeys(operation for alike in layers for operation in alike.operations)
    linears = [o.problem for o in operations if o.source is dense_gpu and type(o) is Operation]
    routed = dict.fromkeys((o.problem, o.times) for o in operations if o.source is expert_paths)
    found: list[Any] = [experts.Workspace(problem, times * max_tokens, "meta") for problem, times in routed]
    recurrent = (o.problem for o in operations if o.source is delta_gpu)
    found += [delta_gpu.Workspace(problem, max_tokens, "meta") for problem in recurrent]
    found += [route_gpu.Workspace("meta")] if any(o.source is route_gpu for o in operations) else []
    return sum(map(tensor_bytes, [*found, dense_gpu.Workspace(linears, max_tokens, gpu, "meta")]))


def _layers(op: str, block: Any, setting: Setting) -> Layers:
    found = block.operations(setting)
    if isinstance(found, str):
        return Layers(op, 1, block.format, refusal=found)
    return Layers(op, 1, block.format, found)


def _counted(found: Sequence[Layers]) -> Iterator[Layers]:
    counts: dict[Layers, int] = {}
    for layers in found:
        counts[layers] = counts.get(layers, 0) + 1
    return (replace(layers, layers=count) for layers, count in counts.items())
