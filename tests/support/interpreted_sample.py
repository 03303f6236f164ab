"""Runs sampling and logprobs under Triton's interpreter, on the CPU, and prints as JSON: for each number of
tokens the winners, those that are wanted and how far ahead they are, and the errors of the logprobs. A
process of its own, because Triton decides when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_sample
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
import triton.language as tl

from firebox.hardware.base import find_gpu
from firebox.kernels import logprobs, sample
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.sampling import MIX, mixed_parameters, random_logits

GPU = find_gpu("gb10")
GUARD = -7
LEAD = 1e-5  # of logarithms of times, which are up to 20 and rounded to float32
LOGARITHM_LIMIT = 3e-6  # float32 of numbers up to 17
LOGPROB_LIMIT = 5e-6  # float32 of numbers up to 20


def other_tokens(case: dict[str, Any]) -> list[int]:
    """The rows of a `draw` whose winner is another than is wanted."""
    assert min(case["leads"], default=1.0) > LEAD, "choose another seed: a race is too close to judge"
    pairs = zip(case["found"], case["wanted"], strict=True)
    return [row for row, (found, wanted) in enumerate(pairs) if found != wanted]


def beyond(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The cases of `log_probabilities` with other tokens or ranks, or an error not below its limit."""
    return {name: c for name, c in found.items() if c["wrong"] or not c["error"] < LOGPROB_LIMIT}


def draw(
    problem: sample.Problem, chunk: int, rows: int, generator: torch.Generator, first: int = 0
) -> dict[str, Any]:
    config = sample.Config(chunk)
    logits = random_logits(rows, problem.vocab, generator)
    bias = torch.randn(logits.shape, generator=generator) if problem.bias else None
    parameters = mixed_parameters(rows, generator, first=first)
    space = sample.scratch(problem, config, rows, "cpu")
    for tensor in (space.tops, space.values, space.masses):
        if tensor is not None:
            tensor.fill_(float("nan"))
    token_ids = torch.full((rows + 1,), GUARD)
    before = logits.clone()
    launcher = Launcher(sample.request(problem, config, GPU, interpreted=True))
    sample.run(launcher, logits, bias, parameters, space, token_ids[:-1])
    assert torch.equal(logits, before) and not space.ended.any() and token_ids[-1] == GUARD
    wanted, leads = sample.reference(problem, logits, bias, parameters)
    return {
        "found": token_ids[:-1].tolist(),
        "wanted": wanted.tolist(),
        "leads": leads.clamp(max=99).tolist(),
    }


def draw_flat(generator: torch.Generator) -> dict[str, Any]:
    """All tokens about equally likely and few of them kept, so that one too many or too few is soon drawn."""
    vocab, rows = 200, 24
    logits = torch.randn(rows, vocab, generator=generator) * 0.05
    parameters = mixed_parameters(rows, generator)
    i = torch.arange(rows)
    parameters.temperature.fill_(1.0)
    parameters.top_k.copy_(torch.where(i < 8, i % 4 + 1, 0))
    parameters.top_p.copy_(torch.where((i >= 8) & (i < 16), (i % 4 + 0.6) / vocab, 1.0))
    parameters.min_p.copy_(torch.where(i >= 16, 0.9 + 0.02 * (i % 4), 0.0))
    problem, config = sample.Problem(vocab), sample.Config(64)
    token_ids = torch.full((rows,), GUARD)
    space = sample.scratch(problem, config, rows, "cpu")
    launcher = Launcher(sample.request(problem, config, GPU, interpreted=True))
    sample.run(launcher, logits, None, parameters, space, token_ids)
    wanted, leads = sample.reference(problem, logits, None, parameters)
    return {"found": token_ids.tolist(), "wanted": wanted.tolist(), "leads": leads.clamp(max=99).tolist()}


@triton.jit
def _logarithms(words, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, sample._log_of_exponential(tl.load(words + i).to(tl.uint32, bitcast=True)))


def worst_logarithm(generator: torch.Generator) -> float:
    """The largest error of ln E, over random numbers, the least, the largest and those in the middle."""
    n = torch.randint(2**24, (1024,), generator=generator)
    n[:300] = torch.cat((torch.arange(100), 2**23 - 50 + torch.arange(100), 2**24 - 100 + torch.arange(100)))
    words = n * 256 + 17
    found = torch.full((1024,), float("nan"))
    _logarithms[(1,)]((words - 2**32 * (words >= 2**31)).int(), found, 1024)
    wanted = (-torch.log1p(-(n.double() + 0.5) / 2**24)).log()
    return float((found - wanted).abs().nan_to_num(torch.inf).max())


def log_probabilities(problem: logprobs.Problem, rows: int, generator: torch.Generator) -> dict[str, float]:
    config = logprobs.Config(chunk=64, warps=4)
    logits = random_logits(rows, problem.vocab, generator)
    token_ids = logits.new_empty(0, dtype=torch.int64)
    if rows:
        token_ids = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    space = logprobs.scratch(problem, config, rows, "cpu")
    outputs = [
        torch.full((rows + 1,), float("nan")),
        torch.full((rows + 1,), GUARD, dtype=torch.int32),
        torch.full((rows + 1, problem.top), GUARD, dtype=torch.int32),
        torch.full((rows + 1, problem.top), float("nan")),
    ]
    launcher = Launcher(logprobs.request(problem, config, GPU, interpreted=True))
    logprobs.run(launcher, logits, token_ids, space, *(output[:-1] for output in outputs))
    assert not space.ended.any() and all(bool(output[-1:].isnan().all()) for output in outputs[::3])
    assert all(bool((output[-1:] == GUARD).all()) for output in outputs[1:3]), "a row behind was written"
    wanted = logprobs.reference(problem, logits, token_ids)
    (value, rank, ids, values), (best, best_rank, best_ids, best_values) = (
        [output[:-1] for output in outputs],
        wanted,
    )
    pairs = ((value, best), (values, best_values))
    errors = [(a - b).masked_fill(a == b, 0.0).abs().nan_to_num(torch.inf) for a, b in pairs]  # −∞ is −∞
    return {
        "error": max((float(error.max()) for error in errors if error.numel()), default=0.0),
        "wrong": int((rank != best_rank).sum() + (ids != best_ids).sum()),
    }


def main() -> None:
    quick_interpreter.begin()
    generator = torch.Generator().manual_seed(0)
    rows = len(MIX)
    drawn = {
        "37": draw(sample.Problem(37), 64, rows, generator),
        "1": draw(sample.Problem(1), 64, 3, generator),
        "bias 500": draw(sample.Problem(500, bias=True), 128, rows, generator),
        "plain 1001": draw(sample.Problem(1001, filters=False), 256, rows, generator),
        "flat": draw_flat(generator),
        "filtered 600": draw(sample.Problem(600), 128, 4, generator, first=2),
        "no rows": draw(sample.Problem(600), 128, 0, generator),
    }
    found = {
        f"{vocab} {top}": log_probabilities(logprobs.Problem(vocab, top), 3, generator)
        for vocab, top in ((300, 5), (25, 20), (200, 0))
    }
    found["no rows"] = log_probabilities(logprobs.Problem(300, 5), 0, generator)
    print(json.dumps({"drawn": drawn, "logprobs": found, "logarithm": worst_logarithm(generator)}))


if __name__ == "__main__":
    main()
