"""Runs expert layers whose inner width no tile divides, filled through their slots with tensors as
checkpoints store them, under Triton's interpreter in float16, and prints as JSON how far they are from the
same tensors dequantised, in float32 and at their own width: {case: [width, kernels' width, {path: relative
error}]}.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_widened
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from firebox.formats import bf16, fp8_channel, int4_group, mxfp4, nvfp4
from firebox.formats.base import Cut, Format, OneOf
from firebox.hardware.base import Gpu, find_gpu
from firebox.kernels._experts import NIBBLES
from firebox.kernels.cpu_moe_block import Problem as LayerProblem
from firebox.layers.base import Build
from firebox.layers.dense import DenseBlock
from firebox.layers.device import Device
from firebox.layers.expert_paths import FEW, SCALED, SORTED, default_path
from firebox.layers.experts import Experts
from firebox.layers.moe_gpu import MoeKernels
from firebox.layers.moe_names import MoeNames
from firebox.layers.norm import RMSNorm
from tests.support import quantise, quick_interpreter
from tests.support.experts import random_routing, relative_error
from tests.support.small_models import mxfp4_groups

Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
HIDDEN, EXPERTS, TOP_K = 128, 3, 2
TOKENS = {FEW: 3, SORTED: 11, SCALED: 11}
GPT_OSS = {"activation": "clamped_swiglu", "limit": 7.0, "alpha": 1.702, "biases": True}


def mxfp4_of(matrix: torch.Tensor) -> Tensors:
    blocks, scales = mxfp4_groups(matrix)
    return {"blocks": blocks, "scales": scales}


def int4_of(matrix: torch.Tensor) -> Tensors:
    scheme = quantise.compressed_scheme(num_bits=4, type="int", strategy="group", group_size=32)
    return quantise.compress("pack-quantized", scheme, matrix)


CASES: dict[str, tuple[Format, Callable[[torch.Tensor], Tensors], int, str]] = {
    "bf16": (bf16.Format(), lambda matrix: {"weight": matrix.bfloat16()}, 52, "gb10"),
    "fp8_channel": (fp8_channel.Format(), fp8_channel.quantise, 176, "gb10"),
    "int4_group": (int4_group.Format(32), int4_of, 96, "gb10"),
    "nvfp4 nibbles": (nvfp4.Format(), quantise.modelopt_nvfp4, 48, "gb10"),
    "mxfp4": (mxfp4.Format(), mxfp4_of, 96, "h200"),
    "mxfp4 nibbles": (mxfp4.Format(), mxfp4_of, 96, "gb10"),
}


class Layer:
    """Three experts; every byte of their memory is one of NaN, or of the highest code, before it is filled.
    They compute in float16 on the CPU, whose interpreter has no bf16, and in bf16 on a GPU."""

    def __init__(self, case: str, gpu: Gpu | None = None, device: torch.device = CPU) -> None:
        self.format, self.quantised, self.inter, gpu_name = CASES[case]
        self.gpu, gpt_oss = gpu or find_gpu(gpu_name), "mxfp4" in case
        self.generator = torch.Generator().manual_seed(len(case))
        self.dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
        names = MoeNames("r", fused="x") if gpt_oss else MoeNames.usual("m")
        further: dict[str, Any] = GPT_OSS if gpt_oss else {}
        sizes = LayerProblem(
            hidden=HIDDEN, inter=self.inter, experts=EXPERTS, top_k=TOP_K, shared_experts=0, eps=1e-5,
            routed_scale=1.0, scoring="softmax", renormalise=True, dtype=self.dtype, **further,
        )  # fmt: skip
        build = Build(
            self.gpu, device, self.dtype, self.dtype, 64, format_of=lambda path: self.format,
            shared=Device(self.gpu, device, 64),
        )  # fmt: skip
        cuts = (Cut(0, self.inter, "inter"), Cut(1, self.inter, "inter"))
        self.made = MoeKernels(build, sizes, names, 1, cuts)
        for weights in (self.made._store.gate_up, self.made._store.down):
            for part in vars(weights).values():
                if part is not None:
                    part.view(torch.uint8).fill_(0xFF)
        self.biases = {
            "x.gate_up_proj_bias": self.random(EXPERTS, 2 * self.inter),
            "x.down_proj_bias": self.random(EXPERTS, HIDDEN),
        }
        self.gate_up, self.down = self.gpt_oss() if gpt_oss else self.one_by_one()
        self.clamped = gpt_oss

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.2

    def one_by_one(self) -> tuple[torch.Tensor, torch.Tensor]:
        stored: Tensors = {}
        meant: dict[str, list[torch.Tensor]] = {"gate": [], "up": [], "down": []}
        for e in range(EXPERTS):
            for part, found in meant.items():
                shape = (HIDDEN, self.inter) if part == "down" else (self.inter, HIDDEN)
                tensors = self.quantised(self.random(*shape))
                found.append(self.format.dequantise(tensors, *shape).float())
                stored |= {f"m.experts.{e}.{part}_proj.{key}": value for key, value in tensors.items()}
        self.fill(stored, interleaved=False)
        gate, up, down = (torch.stack(parts) for parts in meant.values())
        return torch.cat((gate, up), 1), down

    def gpt_oss(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All experts in one tensor, gate and up rows in turn, and biases."""
        stored, meant = dict(self.biases), []
        for part, shape in (("gate_up_proj", (2 * self.inter, HIDDEN)), ("down_proj", (HIDDEN, self.inter))):
            tensors = [self.quantised(self.random(*shape)) for _ in range(EXPERTS)]
            meant.append(torch.stack([self.format.dequantise(one, *shape) for one in tensors]))
            stored |= {f"x.{part}_{key}": torch.stack([one[key] for one in tensors]) for key in tensors[0]}
        self.fill(stored, interleaved=True)
        return torch.cat((meant[0][:, 0::2], meant[0][:, 1::2]), 1), meant[1]

    def fill(self, stored: Tensors, *, interleaved: bool) -> None:
        for entry in self.made.slots(interleaved):
            slot = entry.layouts[0] if isinstance(entry, OneOf) else (entry,)
            for one in slot:
                one.fill({name: stored[name] for name in one.tensors if name in stored})

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that there are."""
        return (FEW, SORTED, SCALED) if self.made.problem.format in NIBBLES else (FEW, SORTED)

    def error(self, name: str) -> float:
        """Of one path, over a workspace of NaN."""
        problem, tokens = replace(self.made.problem, normed=False), TOKENS[name]
        assert self.made._build.shared is not None
        experts = self.made._build.shared.experts(problem, self.made._store.gate_up, self.made._store.down)
        path = default_path(problem, name, tokens if name == FEW else 16, self.gpu)
        experts = Experts(problem, experts.gate_up, experts.down, self.gpu, experts.workspace, {tokens: path})
        for scratch in (experts.workspace.h_few, experts.workspace.partial, experts.workspace.y):
            scratch.fill_(float("nan"))
        ids, weights = random_routing(problem, tokens, self.generator)
        x, residual = (torch.randn(tokens, HIDDEN, generator=self.generator).to(self.dtype) for _ in range(2))
        device = experts.gate_up.w.device
        out = residual.to(device, copy=True)
        experts(x.to(device), ids.to(device), weights.to(device), out)
        return relative_error(out.cpu().float() - residual.float(), self.wanted(x.float(), ids, weights))

    def wanted(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], HIDDEN)
        for t, k in ((t, k) for t in range(x.shape[0]) for k in range(TOP_K)):
            e = int(ids[t, k])
            gate, up = (self.gate_up[e] @ x[t]).chunk(2)
            if self.clamped:
                bias = self.biases["x.gate_up_proj_bias"][e]
                gate, up = (gate + bias[0::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
                y = self.down[e] @ ((up + 1) * gate * (1.702 * gate).sigmoid())
                y = y + self.biases["x.down_proj_bias"][e]
            else:
                y = self.down[e] @ (gate * gate.sigmoid() * up)
            total[t] += weights[t, k] * y
        return total


class Dense:
    """A dense MLP of 40 columns in FP8; its kernels take multiples of 16."""

    def __init__(self) -> None:
        gpu, format = find_gpu("gb10"), fp8_channel.Format()
        build = Build(
            gpu, CPU, torch.float16, torch.float16, 64, format_of=lambda path: format,
            shared=Device(gpu, CPU, 128),
        )  # fmt: skip
        self.inter, self.generator = 40, torch.Generator().manual_seed(40)
        self.block = DenseBlock(build, RMSNorm(build, "norm", HIDDEN, 1e-5), "m", self.inter)
        stored: Tensors = {"norm.weight": torch.ones(HIDDEN)}
        self.meant = {}
        for part in ("gate", "up", "down"):
            shape = (HIDDEN, self.inter) if part == "down" else (self.inter, HIDDEN)
            tensors = fp8_channel.quantise(torch.randn(*shape, generator=self.generator) * 0.2)
            self.meant[part] = format.dequantise(tensors, *shape).float()
            stored |= {f"m.{part}_proj.{key}": value for key, value in tensors.items()}
        for slot in self.block.slots():
            assert not isinstance(slot, OneOf)
            slot.fill({name: stored[name] for name in slot.tensors if name in stored})
        self.block.finish()
        assert self.block.capturable, "the kernels run it"

    def error(self, tokens: int) -> float:
        x = torch.randn(tokens, HIDDEN, generator=self.generator).half()
        before = x.float()
        h = before * (before.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        gate, up = h @ self.meant["gate"].T, h @ self.meant["up"].T
        wanted = (gate * gate.sigmoid() * up) @ self.meant["down"].T
        return relative_error(self.block(x).float() - before, wanted)


def main() -> None:
    quick_interpreter.begin()
    found = {}
    for case in CASES:
        layer = Layer(case)
        errors = {name: layer.error(name) for name in layer.paths}
        found[case] = (layer.inter, layer.made.problem.inter, errors)
    dense = Dense()
    errors = {"few": dense.error(3), "many": dense.error(66)}
    found["dense fp8_channel"] = (dense.inter, dense.block.down.in_features, errors)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
