"""Sampling without a GPU: the kernels under Triton's interpreter against their references, the references
against the engine's own sampler, and the launches compiled for GPUs that are not here. On a GPU:
tests/gpu/test_sample.py."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from firebox.engine import sampler
from firebox.hardware.base import find_gpu
from firebox.kernels import cpu_race, logprobs, sample
from tests.support.interpreted_sample import LOGARITHM_LIMIT, beyond, other_tokens
from tests.support.interpreter import check_launches, interpreted
from tests.support.sampling import MIX, mixed_parameters, random_logits


def test_kernels_equal_their_references_under_the_interpreter() -> None:
    found = interpreted("interpreted_sample")
    for name, case in found["drawn"].items():
        assert not other_tokens(case), name
    assert sum(len(case["found"]) for case in found["drawn"].values()) == 3 * len(MIX) + 3 + 24 + 4
    assert found["logarithm"] < LOGARITHM_LIMIT
    assert not beyond(found["logprobs"])


def test_random_numbers_are_the_cpus() -> None:
    for seed, position in ((0, 0), (2**63 + 12345, 2**35 + 17), (2**64 - 1, 1)):
        times = sample.random_times(1001, seed, position)
        words = [word for block in range(251) for word in cpu_race._words(seed, position, block)][:1001]
        v = (torch.tensor(words, dtype=torch.float64) // 256 + 0.5) / 2**24
        assert torch.equal(times, -torch.log1p(-v))


@pytest.mark.parametrize("parameters", MIX)
def test_the_reference_draws_what_the_engine_draws(parameters: tuple[float, int, float, float]) -> None:
    """Where no two tokens at the border of top_p are equal: of those the engine keeps the lowest ids only."""
    temperature, top_k, top_p, min_p = parameters
    generator, vocab, rows = torch.Generator().manual_seed(3), 999, 40
    logits = torch.randn(rows, vocab, generator=generator) * 3
    columns = mixed_parameters(rows, generator)
    full = dataclasses.replace(
        columns,
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
    )
    requests = [
        SimpleNamespace(
            params=SimpleNamespace(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                logit_bias={},
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                min_tokens=0,
            ),
            request_id="r",
            token_ids=range(position),
            output_tokens=0,
            prompt_tokens=position,
        )
        for seed, position in zip(full.seed.tolist(), (columns.position % 10**6).tolist(), strict=True)
    ]
    full = dataclasses.replace(full, position=columns.position % 10**6)
    found, _ = sample.reference(sample.Problem(vocab), logits, None, full)
    assert found.tolist() == sampler.sample(logits, requests, frozenset())


def test_the_kept_set_is_the_engines() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(MIX), 700, generator=generator) * 3
    parameters = mixed_parameters(len(MIX), generator)
    keep = sample.kept(sample.Problem(700), logits, parameters)
    for row, (temperature, top_k, top_p, min_p) in enumerate(MIX):
        scaled = logits[row] / max(temperature, sampler.LEAST_TEMPERATURE)
        sampler._filter(scaled, SimpleNamespace(top_k=top_k, top_p=top_p, min_p=min_p))
        assert torch.equal(keep[row], scaled > -torch.inf), MIX[row]


def test_the_logprobs_reference_is_the_engines() -> None:
    logits = random_logits(4, 300, torch.Generator().manual_seed(0))[1::2]
    token_ids = torch.tensor([150, 150])
    rows = sampler.token_logprobs(logits, token_ids.tolist(), [7, 7])
    values, ranks, top_ids, top_values = logprobs.reference(logprobs.Problem(300, 7), logits, token_ids)
    for i, row in enumerate(rows):
        assert (row.token_id, row.rank, row.top_ids) == (150, int(ranks[i]), top_ids[i].tolist())
        found = torch.tensor([row.logprob, *row.top_logprobs]).double()
        torch.testing.assert_close(found, torch.cat((values[i : i + 1], top_values[i])), rtol=0, atol=5e-6)


def test_every_launch_fits() -> None:
    requests = {}
    for name in ("gb10", "h200"):
        gpu = find_gpu(name)
        for vocab in (202048, 151936, 32001):
            for filters in (False, True):
                problem = sample.Problem(vocab, filters=filters)
                request = sample.request(problem, sample.default(problem, gpu), gpu)
                requests[f"{name} sample {vocab} {filters}"] = request
            for top in (0, 20):
                p = logprobs.Problem(vocab, top)
                requests[f"{name} logprobs {vocab} {top}"] = logprobs.request(
                    p, logprobs.default(p, gpu), gpu
                )
    check_launches(requests)
