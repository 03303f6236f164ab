"""Next tokens and logprobs on an NVIDIA GPU, by kernels/sample.py and kernels/logprobs.py. A draw does not
wait for the device, so that the next step can be launched behind it; looking up logprobs does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from firebox.engine.messages import TokenLogprobs
from firebox.engine.request import Request
from firebox.hardware.base import Gpu
from firebox.kernels import logprobs, sample
from firebox.kernels.launch import INTERPRETED, Launcher
from firebox.layers.device import tensor_bytes

FILTERED_AT_ONCE = 32  # rows; the scratch of one is 10 bytes a token of the vocabulary


class GpuSampler:
    """For up to `max_rows` rows a call. Its scratch is shared by all calls: they run one after the other."""

    def __init__(self, vocab: int, gpu: Gpu, device: torch.device, max_rows: int) -> None:
        self.device = device
        self._plain, self._filtering = (_Draw(p, gpu, device, max_rows) for p in sample.kinds(vocab))
        self._lookups = {problem.top: _Lookup(problem, gpu) for problem in logprobs.kinds(vocab)}

    @property
    def kept_bytes(self) -> int:
        """Of the scratch."""
        return tensor_bytes(self._plain.scratch) + tensor_bytes(self._filtering.scratch)

    @property
    def most_logprobs(self) -> int:
        """How many alternatives `logprobs` finds."""
        return max(self._lookups)

    def plain(self, logits: torch.Tensor, parameters: sample.Parameters, token_ids: torch.Tensor) -> None:
        """Writes a token for each row of `logits` [rows, vocab] float32 to `token_ids` [rows] int64;
        filters are not read."""
        self._plain(logits, parameters, token_ids)

    def filtered(self, logits: torch.Tensor, parameters: sample.Parameters, token_ids: torch.Tensor) -> None:
        """The same with top_k, top_p and min_p."""
        for first in range(0, len(logits), FILTERED_AT_ONCE):
            some = slice(first, first + FILTERED_AT_ONCE)
            part = sample.Parameters(**{name: column[some] for name, column in vars(parameters).items()})
            self._filtering(logits[some], part, token_ids[some])

    def logprobs(
        self, logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]
    ) -> list[TokenLogprobs]:
        """As engine/sampler.py's: of `token_ids` [rows], with `tops` [rows] ≤ `most_logprobs`
        alternatives."""
        most = self.most_logprobs if any(tops) else 0
        ids = torch.tensor(token_ids, dtype=torch.int64).to(self.device)
        values, ranks, top_ids, top_values = (
            output.tolist() for output in self._lookups[most](logits.contiguous(), ids)
        )
        rows = zip(token_ids, values, ranks, top_ids, top_values, tops, strict=True)
        return [
            TokenLogprobs(token_id, value, rank, its_ids[:top], its_values[:top])
            for token_id, value, rank, its_ids, its_values, top in rows
        ]


class _Draw:
    def __init__(self, problem: sample.Problem, gpu: Gpu, device: torch.device, max_rows: int) -> None:
        config = sample.default(problem, gpu)
        self._launcher = Launcher(sample.request(problem, config, gpu, interpreted=INTERPRETED))
        self.scratch = sample.scratch(problem, config, _scratch_rows(problem, max_rows), device)

    def __call__(self, logits: torch.Tensor, parameters: sample.Parameters, token_ids: torch.Tensor) -> None:
        sample.run(self._launcher, logits, None, parameters, self.scratch, token_ids)


class _Lookup:
    def __init__(self, problem: logprobs.Problem, gpu: Gpu) -> None:
        self._problem, self._config = problem, logprobs.default(problem, gpu)
        self._launcher = Launcher(logprobs.request(problem, self._config, gpu, interpreted=INTERPRETED))

    def __call__(self, logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scratch = logprobs.scratch(self._problem, self._config, len(logits), logits.device)
        outputs = logprobs.outputs(self._problem, len(logits), logits.device)
        logprobs.run(self._launcher, logits, token_ids, scratch, *outputs)
        return outputs


def scratch_bytes(vocab: int, gpu: Gpu, max_rows: int) -> int:
    """What a sampler will keep."""
    found = (
        sample.scratch(p, sample.default(p, gpu), _scratch_rows(p, max_rows), "meta")
        for p in sample.kinds(vocab)
    )
    return sum(map(tensor_bytes, found))


def parameters_of(requests: Sequence[Request], device: torch.device) -> sample.Parameters:
    """How to draw the next token of each request."""
    params = [request.params for request in requests]

    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return sample.Parameters(
        column([p.temperature for p in params], torch.float32),
        column([signed(p.seed or 0) for p in params], torch.int64),
        column([len(request.token_ids) for request in requests], torch.int64),
        column([p.top_k for p in params], torch.int32),
        column([p.top_p for p in params], torch.float32),
        column([p.min_p for p in params], torch.float32),
    )


def filters(request: Request) -> bool:
    """Does it draw, and not from all tokens?"""
    p = request.params
    return p.temperature > 0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)


def signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    bits = seed % 2**64
    return bits - 2**64 if bits >= 2**63 else bits


def _scratch_rows(problem: sample.Problem, max_rows: int) -> int:
    return min(max_rows, FILTERED_AT_ONCE) if problem.filters else max_rows
