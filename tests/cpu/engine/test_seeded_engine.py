"""Seeded sampling through the whole engine: the same request gives the same ids, whatever runs beside it.

The last bits of a logit depend on how many tokens a step computes: the sums run in another order. So a
race that two tokens finish within 1e-5 or so of each other may go either way. That is allowed here if noise
of that size makes the sampler waver between the two.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.engine import runner
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.sampler import sample
from firebox.engine.scheduler import Scheduler
from tests.support.engine import InProcessEngine

BUNDLED = Path(__file__).parents[3] / "src/firebox/assets/firebox-tiny"
TOKENS = 48
SAMPLED = SamplingParams(max_tokens=TOKENS, temperature=1.0, ignore_eos=True)
# eight ways to sample, so that no request can hide behind a neighbour's settings
PARAMS = [
    replace(SAMPLED, seed=0),
    replace(SAMPLED, seed=1, temperature=1.5),
    replace(SAMPLED, seed=2, top_k=40),
    replace(SAMPLED, seed=3, top_p=0.9),
    replace(SAMPLED, seed=-4, min_p=0.02),
    replace(SAMPLED, seed=2**64 - 1, repetition_penalty=1.2, frequency_penalty=0.3),
    replace(SAMPLED, temperature=0.0),
    replace(SAMPLED, seed=7, min_tokens=20, logit_bias={5: 1.0}),
]


@pytest.fixture(scope="module")
def engine() -> InProcessEngine:
    return InProcessEngine(BUNDLED)


@pytest.fixture(scope="module")
def prompts(engine: InProcessEngine) -> list[list[int]]:
    rng = random.Random(5)
    return [
        [rng.randrange(1, engine.ready.vocab_size) for _ in range(n)] for n in (1, 2, 16, 17, 33, 40, 64, 100)
    ]


@pytest.fixture(scope="module")
def alone(engine: InProcessEngine, prompts: list[list[int]]) -> list[list[int]]:
    """What each request gives when nothing else runs and nothing is cached."""
    found = []
    for prompt, params in zip(prompts, PARAMS, strict=True):
        renew(engine)
        found += engine.generate([prompt], params)
    return found


def renew(engine: InProcessEngine, *, pages: int = 256, prefix_cache: bool = True, chunk: int = 512) -> None:
    """An empty cache and a new scheduler over the same model."""
    engine.scheduler = Scheduler(
        KVCache(CacheSizes(pages, engine.ready.page_tokens), prefix_cache),
        max_running_requests=8,
        max_batch_tokens=512,
        prefill_chunk_tokens=chunk,
        eos_token_ids=frozenset(engine.ready.eos_token_ids),
    )


def together(engine: InProcessEngine, prompts: list[list[int]], order: list[int]) -> list[list[int]]:
    """Runs all requests at once, submitted in `order`; outputs in the requests' own order."""
    request_ids = {i: engine.submit(prompts[i], PARAMS[i]) for i in order}
    deltas = engine.deltas()
    return [[token for delta in deltas[request_ids[i]] for token in delta.ids] for i in range(len(prompts))]


def same(
    engine: InProcessEngine, prompts: list[list[int]], found: list[list[int]], alone: list[list[int]]
) -> None:
    """Asserts equal outputs, up to a token that rounding decides."""
    assert [len(ids) for ids in found] == [len(ids) for ids in alone]
    for number, (ids, expected) in enumerate(zip(found, alone, strict=True)):
        if ids != expected:
            at = next(i for i in range(TOKENS) if ids[i] != expected[i])
            wavering = draws_under_noise(engine, prompts[number], expected[:at], PARAMS[number])
            assert {ids[at], expected[at]} <= wavering, f"request {number} differs at token {at}"
    assert sum(ids != expected for ids, expected in zip(found, alone, strict=True)) <= 2


def draws_under_noise(
    engine: InProcessEngine, prompt: list[int], output: list[int], params: SamplingParams
) -> set[int]:
    """The tokens that `sample` may choose next when every logit is off by about 5e-5."""
    caught: list[torch.Tensor] = []

    def catch(logits: torch.Tensor, requests: list[Request], eos_token_ids: frozenset[int]) -> list[int]:
        caught.append(logits.clone())
        return sample(logits, requests, eos_token_ids)

    scheduler = engine.scheduler
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "sample", catch)
        renew(engine)
        engine.generate([prompt + output], replace(SAMPLED, max_tokens=1, temperature=0.0))
    engine.scheduler = scheduler
    request = Request(0, list(prompt), params)
    request.token_ids += output
    noise = torch.randn(400, caught[0].shape[-1], generator=torch.Generator().manual_seed(0)) * 5e-5
    return set(sample(caught[0] + noise, [request] * 400, frozenset(engine.ready.eos_token_ids)))


def test_noise_alone_does_not_excuse_another_token(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    """Nearly everywhere the noise leaves one choice: a wrong seed or position could not hide behind it."""
    choices = [
        len(draws_under_noise(engine, prompts[i], alone[i][:at], PARAMS[i]))
        for i in range(8)
        for at in range(0, TOKENS, 8)
    ]
    assert sum(count > 1 for count in choices) <= 2


def test_the_requests_are_worth_comparing(alone: list[list[int]]) -> None:
    """If the model gave one token for ever, equal outputs would prove little."""
    assert all(len(ids) == TOKENS for ids in alone)
    assert len({tuple(ids) for ids in alone}) == len(alone)
    assert min(len(set(ids)) for ids in alone) >= 5


def test_alone_once_more(engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]]) -> None:
    renew(engine)
    assert [engine.generate([p], params)[0] for p, params in zip(prompts, PARAMS, strict=True)] == alone, (
        "bit for bit"
    )


def test_in_a_batch_of_eight_in_any_order(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    for seed in range(3):
        renew(engine, prefix_cache=False)
        same(engine, prompts, together(engine, prompts, random.Random(seed).sample(range(8), 8)), alone)


def test_after_a_prefix_hit(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]]
) -> None:
    renew(engine)
    together(engine, prompts, list(range(8)))
    before = engine.scheduler.stats().cached_prompt_tokens
    same(engine, prompts, together(engine, prompts, list(range(8))), alone)
    assert engine.scheduler.stats().cached_prompt_tokens >= before + 16 + 32 + 32 + 48 + 96


@pytest.mark.parametrize("chunk", [1, 7, 16, 31])
def test_chunked_prefill(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]], chunk: int
) -> None:
    renew(engine, chunk=chunk)
    same(engine, prompts, together(engine, prompts, list(range(8))), alone)


@pytest.mark.parametrize("chunk", [13, 512])
def test_beside_prompts_whose_logprobs_are_wanted(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]], chunk: int
) -> None:
    """They need logits for every row of their chunks, so the sampling rows stand between others."""
    renew(engine, chunk=chunk)
    asking = [i for i in range(8) if i % 2 == 0]
    request_ids = [
        engine.submit(prompts[i], replace(PARAMS[i], prompt_logprobs=2 if i in asking else None))
        for i in range(8)
    ]
    deltas = engine.deltas()
    found = [[token for delta in deltas[request_id] for token in delta.ids] for request_id in request_ids]
    same(engine, prompts, found, alone)
    for i in asking:
        given = deltas[request_ids[i]][0].prompt_logprobs
        assert given is not None and [entry and entry.token_id for entry in given] == [None, *prompts[i][1:]]


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("pages", [10, 12, 16])
def test_when_pages_run_out(
    engine: InProcessEngine, prompts: list[list[int]], alone: list[list[int]], pages: int, prefix_cache: bool
) -> None:
    for order in (list(range(8)), list(range(7, -1, -1))):
        renew(engine, pages=pages, prefix_cache=prefix_cache)
        same(engine, prompts, together(engine, prompts, order), alone)
        assert engine.scheduler.stats().retractions >= 2, "the pages never ran out: the test is too weak"


def test_different_seeds_differ(engine: InProcessEngine, prompts: list[list[int]]) -> None:
    renew(engine)
    found = [engine.generate([prompts[3]], replace(SAMPLED, seed=seed))[0] for seed in range(6)]
    assert len({tuple(ids) for ids in found}) == 6
    assert len({ids[0] for ids in found}) > 2, "the first token hardly depends on the seed"


def test_a_continued_answer_goes_on_as_it_would_have(
    engine: InProcessEngine, prompts: list[list[int]]
) -> None:
    """The draw depends on seed and position alone: half an answer, sent back as a prompt, ends alike."""
    renew(engine)
    params = replace(SAMPLED, seed=11)
    (whole,) = engine.generate([prompts[4]], params)
    (rest,) = engine.generate([prompts[4] + whole[:10]], replace(params, max_tokens=TOKENS - 10))
    if rest != whole[10:]:
        at = next(i for i, (a, b) in enumerate(zip(rest, whole[10:], strict=True)) if a != b)
        wavering = draws_under_noise(engine, prompts[4], whole[: 10 + at], params)
        assert {rest[at], whole[10 + at]} <= wavering
