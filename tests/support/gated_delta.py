"""Random gated delta nets. Needs torch and Triton, nothing of the engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from firebox.kernels._gated_delta import Inputs, Problem, Weights

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def of_one_product(p: Problem) -> Problem:
    """The same with its four projections in one matrix."""
    return dataclasses.replace(p, strides=(p.channels + p.heads * (p.value_dim + 2),) * 4)


QWEN = of_one_product(Problem(16, 64, 128, 128, 3, 1e-6))  # Qwen3.5-397B; under TP 4:
QWEN_TP4 = of_one_product(Problem(4, 16, 128, 128, 3, 1e-6))


@dataclass
class Layer:
    """A layer's weights, and the states of `slots` requests."""

    problem: Problem
    weights: Weights
    conv_state: torch.Tensor
    state: torch.Tensor


def random_layer(
    p: Problem, slots: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Layer:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weights = Weights(
        conv=normal(p.channels, p.taps + 1) * 0.5,
        dt_bias=normal(p.heads),
        a_log=normal(p.heads),
        norm=(normal(p.value_dim) * 0.2 + 1).to(DTYPES[p.dtype]),
    )
    conv_state = normal(slots, p.channels, p.taps)
    return Layer(p, weights, conv_state, normal(slots, p.heads, p.key_dim, p.value_dim) * 0.1)


def make_keys_alike(layer: Layer, inputs: Inputs, generator: torch.Generator) -> None:
    """All keys nearly one, hardly any decay, β nearly 1: a chunk's tokens overwrite each other, and powers of
    A grow beyond float32."""
    p = layer.problem
    rows = p.key_heads * p.key_dim
    layer.weights.a_log.fill_(-8.0)
    inputs.b.fill_(6.0)
    device = inputs.mixed.device
    same = torch.randn(1, rows, generator=generator, device=device)
    noise = torch.randn(len(inputs.mixed), rows, generator=generator, device=device) * 0.05
    inputs.mixed[:, rows : 2 * rows] = (same + noise).to(inputs.mixed.dtype)


def random_inputs(
    p: Problem,
    lengths: list[int],
    slots: list[int],
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Requests of so many tokens, with so many slots; with strides, columns of one matrix."""
    tokens = sum(lengths)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(tokens, width, generator=generator, device=device).to(DTYPES[p.dtype])

    widths = (p.channels, p.heads * p.value_dim, p.heads, p.heads)
    found = [normal(width) for width in widths]
    if p.strides is not None:
        assert p.strides == (sum(widths),) * 4, p
        found = list(torch.cat(found, dim=1).split(list(widths), dim=1))
    mixed, z, b, a = found
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return Inputs(
        mixed=mixed,
        z=z,
        a=a,
        b=b,
        query_start=starts,
        state_slots=torch.tensor(slots, dtype=torch.int64, device=device),
    )
