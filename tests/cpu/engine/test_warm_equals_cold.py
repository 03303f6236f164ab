"""Cold = warm, token for token: random requests with shared prefixes, in a cache so small that pages, windows
and snapshots are evicted and requests retracted all the time, against the same requests computed alone
without a prefix cache. Every model file is a case, so that each cache kind is met in real layers."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from firebox.engine.messages import SamplingParams
from firebox.engine.sampler import philox_uniform
from firebox.find import load, names
from tests.support.checkpoints import write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

REQUESTS = 40


@pytest.fixture(scope="module", params=names("models"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), load("models", request.param).TINY)


def traffic(rng: random.Random, vocab: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that begin with parts of a few common texts; half are greedy, half sampled with a seed."""
    texts = [[rng.randrange(1, vocab) for _ in range(90)] for _ in range(3)]
    found = []
    for number in range(REQUESTS):
        prompt = rng.choice(texts)[: rng.randrange(90)] + [
            rng.randrange(1, vocab) for _ in range(rng.randrange(1, 12))
        ]
        params = SamplingParams(max_tokens=rng.randrange(1, 70), temperature=0.0, ignore_eos=True)
        if number % 2:
            params = msgspec.structs.replace(params, temperature=0.7, seed=number)
        found.append((prompt, params))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_warm_equals_cold(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    cold = InProcessEngine(folder, prefix_cache=False)
    requests = traffic(rng, cold.ready.vocab_size)
    expected = [cold.generate([prompt], params)[0] for prompt, params in requests]

    warm = InProcessEngine(
        folder, kv_pages=14, context_length=200, max_running_requests=5, prefill_chunk_tokens=24
    )
    waiting, submitted, outputs = list(enumerate(requests)), {}, {}
    while waiting or warm.scheduler.has_work:
        while waiting and rng.random() < 0.5:
            number, (prompt, params) = waiting.pop(0)
            submitted[warm.submit(prompt, params)] = number
        for delta in warm.step():
            outputs.setdefault(submitted[delta.request_id], []).extend(delta.ids)

    stats = warm.scheduler.stats()
    assert stats.cached_prompt_tokens > 0 and stats.retractions > 0, f"the traffic is too tame: {stats}"
    ties = []
    for number, (prompt, params) in enumerate(requests):
        found, wanted = outputs[number], expected[number]
        if found == wanted:
            continue
        same = next(i for i, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        known = prompt + wanted[:same]
        message = f"request {number}, token {same}: {len(prompt)} tokens, {params}"
        assert is_tie(cold, known, params, found[same], wanted[same]), message
        ties.append(message)
    assert len(ties) <= 1, ties


def is_tie(engine: InProcessEngine, ids: list[int], params: SamplingParams, one: int, other: int) -> bool:
    """Are the two tokens after `ids` closer than the rounding of a layer composed of torch operators, whose
    sums depend on the batch? For a greedy request their logits are, for another the draw falls on the border
    between them."""
    kept: list[torch.Tensor] = []
    logits_of = engine.runner.model.logits

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(logits_of(x))
        return kept[-1].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner.model, "logits", keep)
        engine.generate([ids], msgspec.structs.replace(GREEDY, max_tokens=1))
    logits = kept[-1][-1].double()
    if params.temperature == 0.0:
        return bool((logits[one] - logits[other]).abs() < 1e-4)
    assert params.seed is not None
    cumulative = (logits / params.temperature).softmax(-1).cumsum(-1)
    low, high = sorted((one, other))
    drawn = philox_uniform(params.seed, len(ids))
    return abs(float(cumulative[low]) - drawn) < 1e-5 and abs(float(cumulative[high - 1]) - drawn) < 1e-5
