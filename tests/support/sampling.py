"""Logits and sampling parameters that meet every path of the sampling kernel. Needs torch and Triton, nothing
of the engine."""

from __future__ import annotations

import torch

from firebox.kernels.sample import Parameters

# temperature, top_k, top_p, min_p
MIX = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 50, 0.95, 0.0),
    (1.0, 0, 1.0, 0.05),
    (0.8, 40, 0.9, 0.02),
    (1.0, 1, 1.0, 0.0),
    (0.0, 5, 0.5, 0.5),  # greedy for all that
    (1e-9, 0, 1.0, 0.0),
    (2.0, 10**6, 0.999, 0.0),
    (1.0, 3, 0.01, 0.0),
    (5.0, 0, 0.5, 1e-4),
)


def random_logits(
    rows: int, vocab: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[rows, vocab] float32: a model's shape, about N(0, 3²) with a few tokens far ahead; steps of 1/64 in
    every other row, so that many are equal; a tenth excluded."""
    logits = torch.randn(rows, vocab, generator=generator, device=device) * 3
    ahead = torch.randint(vocab, (rows, 6), generator=generator, device=device)
    logits.scatter_add_(1, ahead, torch.rand(rows, 6, generator=generator, device=device) * 8)
    logits[::2] = (logits[::2] * 64).round() / 64
    excluded = torch.rand(rows, vocab, generator=generator, device=device) < 0.1
    excluded[:, vocab // 2] = False
    return logits.masked_fill(excluded, -torch.inf)


def mixed_parameters(
    rows: int, generator: torch.Generator, device: torch.device | str = "cpu", first: int = 0
) -> Parameters:
    """The rows of MIX in turn, from `first` on; seeds and positions of all 64 bits."""
    chosen = [MIX[(first + row) % len(MIX)] for row in range(rows)]
    columns = list(zip(*chosen, strict=True)) or [()] * 4

    def number(values: tuple[float, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def bits(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows,), generator=generator, device=device)

    return Parameters(
        temperature=number(columns[0]),
        seed=bits(2**62) * 2 - 2**62,
        position=bits(2**40),
        top_k=number(columns[1], torch.int32),
        top_p=number(columns[2]),
        min_p=number(columns[3]),
    )
