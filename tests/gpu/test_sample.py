"""Sampling and logprobs on a real GPU, at the vocabularies of models. Needs torch, Triton and pytest, nothing
of the engine."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from firebox.hardware.base import Gpu
from firebox.hardware.probe import probe_gpu
from firebox.kernels import logprobs, sample
from firebox.kernels.launch import Launcher
from tests.support.sampling import MIX, mixed_parameters, random_logits

pytestmark = pytest.mark.gpu

LEAD = 1e-5  # of logarithms of times, which are up to 20 and rounded to float32
CLOSE_P = 1e-6  # relative: how exactly float32 adds up 200,000 probabilities
VOCABS = (202_048, 151_936, 32_001, 5, 1)


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    found = probe_gpu()
    assert found is not None, "these tests need a GPU"
    return found


def on(device: str, parameters: sample.Parameters) -> sample.Parameters:
    return sample.Parameters(**{name: tensor.to(device) for name, tensor in vars(parameters).items()})


class Sampler:
    """One compiled problem with scratch memory for `rows`."""

    def __init__(self, problem: sample.Problem, gpu: Gpu, rows: int) -> None:
        self.problem, config = problem, sample.default(problem, gpu)
        self.launcher = Launcher(sample.request(problem, config, gpu))
        self.space = sample.scratch(problem, config, rows, "cuda")

    def __call__(
        self, logits: torch.Tensor, parameters: sample.Parameters, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        for tensor in (self.space.tops, self.space.values, self.space.masses):
            if tensor is not None:
                tensor.fill_(float("nan"))
        token_ids = torch.full((len(logits) + 1,), -7, device="cuda")
        sample.run(self.launcher, logits, bias, parameters, self.space, token_ids[:-1])
        assert not self.space.ended.any() and token_ids[-1] == -7
        return token_ids[:-1].cpu()


def judged(
    problem: sample.Problem, logits: torch.Tensor, bias: torch.Tensor | None, parameters: sample.Parameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """Wanted tokens, and which rows rounding cannot decide: the race is not close, and a hair's breadth of
    top_p or min_p does not change the winner."""
    wanted, leads = sample.reference(problem, logits, bias, parameters)
    sure = leads > LEAD
    if problem.filters:
        for factor in (1 - CLOSE_P, 1 + CLOSE_P):
            top_p = torch.where(parameters.top_p < 1, parameters.top_p * factor, parameters.top_p)
            other = dataclasses.replace(parameters, top_p=top_p, min_p=parameters.min_p * factor)
            sure &= sample.reference(problem, logits, bias, other)[0] == wanted
    return wanted, sure


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
def test_every_kind_of_row(vocab: int, bias: bool, gpu: Gpu) -> None:
    generator, rows = torch.Generator().manual_seed(vocab), 2 * len(MIX)
    problem = sample.Problem(vocab, bias)
    sampler, unsure = Sampler(problem, gpu, rows), 0
    for count in (rows, 0, 1, 3):
        logits = random_logits(count, vocab, generator)
        added = torch.randn(count, vocab, generator=generator) if bias else None
        parameters = mixed_parameters(count, generator, first=2)
        wanted, sure = judged(problem, logits, added, parameters)
        given = None if added is None else added.cuda()
        found = sampler(logits.cuda(), on("cuda", parameters), given)
        assert torch.equal(found[sure], wanted[sure]), (count, (found != wanted).nonzero().flatten().tolist())
        assert ((found >= 0) & (found < vocab)).all()
        unsure += int((~sure).sum())
    assert unsure <= 2, unsure


@pytest.mark.parametrize("vocab", [202_048, 1000])
def test_plain_rows_without_filters(vocab: int, gpu: Gpu) -> None:
    generator, problem = torch.Generator().manual_seed(1), sample.Problem(vocab, filters=False)
    parameters = mixed_parameters(256, generator)
    temperature = (torch.arange(256) % 3).float() * 0.6
    parameters = dataclasses.replace(parameters, temperature=temperature)
    logits = random_logits(256, vocab, generator)
    wanted, sure = judged(problem, logits, None, parameters)
    found = Sampler(problem, gpu, 256)(logits.cuda(), on("cuda", parameters))
    assert torch.equal(found[sure], wanted[sure]) and sure.float().mean() > 0.97


@pytest.mark.parametrize("vocab", [50_000])
def test_hard_distributions(vocab: int, gpu: Gpu) -> None:
    """All equal, all but one excluded, a geometric fall to where probabilities vanish, one far ahead."""
    generator, problem = torch.Generator().manual_seed(2), sample.Problem(vocab)
    equal = torch.full((vocab,), 1.5)
    single = torch.full((vocab,), -torch.inf)
    single[vocab - 1] = -3.0
    falling = -torch.arange(vocab).float() * 0.01
    ahead = torch.randn(vocab, generator=generator)
    ahead[7] = 100.0
    tiny = torch.randn(vocab, generator=generator) * 1e-38
    logits = torch.stack((equal, single, falling, ahead, tiny)).repeat_interleave(len(MIX), 0)
    parameters = mixed_parameters(len(logits), generator)
    wanted, sure = judged(problem, logits, None, parameters)
    found = Sampler(problem, gpu, len(logits))(logits.cuda(), on("cuda", parameters))
    assert torch.equal(found[sure], wanted[sure]), (found != wanted).nonzero().flatten().tolist()
    assert sure.sum() >= len(logits) - 4
    assert (found[len(MIX) : 2 * len(MIX)] == vocab - 1).all()


def test_frequencies_are_the_probabilities(gpu: Gpu) -> None:
    rows, vocab = 200_000, 8
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 1.0, -torch.inf, 0.2], device="cuda")
    problem = sample.Problem(vocab, filters=False)
    ones = torch.ones(rows, device="cuda")
    position = torch.arange(rows, device="cuda")
    parameters = sample.Parameters(
        ones, torch.full_like(position, 1234), position, position.int(), ones, ones
    )
    found = torch.empty(rows, dtype=torch.int64, device="cuda")
    config = sample.default(problem, gpu)
    launcher = Launcher(sample.request(problem, config, gpu))
    for first in range(0, rows, 50_000):
        part = slice(first, first + 50_000)
        its = sample.Parameters(**{name: tensor[part] for name, tensor in vars(parameters).items()})
        space = sample.scratch(problem, config, 50_000, "cuda")
        sample.run(launcher, logits.expand(50_000, -1).contiguous(), None, its, space, found[part])
    shares = found.bincount(minlength=vocab) / rows
    wanted = logits.softmax(0)
    sigma = (wanted * (1 - wanted) / rows).sqrt()
    assert ((shares - wanted).abs() <= 4.5 * sigma).all(), (shares - wanted) / sigma


def test_in_a_captured_graph_with_other_parameters(gpu: Gpu) -> None:
    """One graph serves any mix: what a row asks for is on the device."""
    generator, problem = torch.Generator().manual_seed(9), sample.Problem(32_001)
    rows = len(MIX)
    sampler = Sampler(problem, gpu, rows)
    logits = torch.zeros(rows, problem.vocab, device="cuda")
    parameters = on("cuda", mixed_parameters(rows, generator))
    token_ids = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def step() -> None:
        sample.run(sampler.launcher, logits, None, parameters, sampler.space, token_ids)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for first in range(5):
        fresh = mixed_parameters(rows, generator, first=first)
        for name, tensor in vars(fresh).items():
            getattr(parameters, name).copy_(tensor)
        given = random_logits(rows, problem.vocab, generator)
        logits.copy_(given)
        graph.replay()
        wanted, sure = judged(problem, given, None, fresh)
        assert torch.equal(token_ids.cpu()[sure], wanted[sure]) and sure.sum() >= rows - 1


@pytest.mark.parametrize(("vocab", "top"), [(202_048, 20), (151_936, 5), (32_001, 0), (20, 20), (5000, 1)])
def test_logprobs(vocab: int, top: int, gpu: Gpu) -> None:
    generator, problem = torch.Generator("cuda").manual_seed(0), logprobs.Problem(vocab, top)
    config = logprobs.default(problem, gpu)
    launcher = Launcher(logprobs.request(problem, config, gpu))
    for rows in (0, 1, 5, 64):
        logits = random_logits(rows, vocab, generator, "cuda")
        token_ids = torch.randint(vocab, (rows,), generator=generator, device="cuda")
        token_ids[:1] = vocab // 2
        space = logprobs.scratch(problem, config, rows, "cuda")
        outputs = [
            torch.full((rows + 1,), float("nan"), device="cuda"),
            torch.full((rows + 1,), -7, dtype=torch.int32, device="cuda"),
            torch.full((rows + 1, top), -7, dtype=torch.int32, device="cuda"),
            torch.full((rows + 1, top), float("nan"), device="cuda"),
        ]
        values, ranks, ids, its_values = (output[:-1] for output in outputs)
        logprobs.run(launcher, logits, token_ids, space, values, ranks, ids, its_values)
        assert all(bool(output[-1:].isnan().all()) for output in outputs[::3])
        assert all(bool((output[-1:] == -7).all()) for output in outputs[1:3]), "a row behind was written"
        wanted = logprobs.reference(problem, logits, token_ids)
        assert torch.equal(ranks, wanted[1].int()) and torch.equal(ids, wanted[2].int())
        torch.testing.assert_close(values.double(), wanted[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(its_values.double(), wanted[3], rtol=0, atol=1e-5)
        assert not space.ended.any()
