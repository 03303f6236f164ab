"""Cold = warm, token for token: random requests with shared prefixes, in a cache so small that pages, windows
and snapshots are evicted and requests retracted all the time, against the same requests computed alone
without a prefix cache. Every model file is a case, so that each cache kind is met in real layers."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from firebox.engine.messages import SamplingParams
from firebox.find import load, names
from tests.support.checkpoints import write_checkpoint
from tests.support.engine import InProcessEngine

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
    for number, (prompt, params) in enumerate(requests):
        assert outputs[number] == expected[number], f"request {number}: {len(prompt)} tokens, {params}"
