"""Every model file on its TINY config, with a random checkpoint that transformers wrote, against
transformers' own answers."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch

from firebox.find import load, names
from tests.support.checkpoints import load_reference, reference_greedy, reference_logprobs, write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

BUNDLED = Path(__file__).parents[3] / "src/firebox/assets/firebox-tiny"
TOKENS = 24


class Case:
    """One checkpoint, our engine on it, prompts of several lengths, and what transformers makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = InProcessEngine(folder)
        self.reference = load_reference(folder)
        rng = random.Random(1)
        vocab = self.engine.ready.vocab_size
        self.prompts = [[rng.randrange(1, vocab) for _ in range(n)] for n in (1, 2, 15, 16, 17, 33, 64, 100)]
        self.expected = [reference_greedy(self.reference, prompt, TOKENS) for prompt in self.prompts]


@pytest.fixture(scope="module", params=[*names("models"), "bundled"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "bundled":
        return Case(BUNDLED)
    folder = tmp_path_factory.mktemp(request.param)
    return Case(write_checkpoint(folder, load("models", request.param).TINY, shard_bytes=100_000))


def test_the_reference_is_worth_comparing_with(case: Case) -> None:
    """Random weights could give one token for ever, whatever the prompt; then equality would prove little."""
    assert len({tuple(ids) for ids in case.expected}) == len(case.expected)
    assert sum(len(set(ids)) for ids in case.expected) > 4 * len(case.expected)


def test_alone(case: Case) -> None:
    for prompt, expected in zip(case.prompts, case.expected, strict=True):
        assert case.engine.generate([prompt]) == [expected]


def test_in_a_batch_of_eight(case: Case) -> None:
    engine = InProcessEngine(case.folder, prefix_cache=False)
    assert engine.generate(case.prompts) == case.expected


def test_after_a_prefix_hit(case: Case) -> None:
    engine = InProcessEngine(case.folder)
    first = engine.generate(case.prompts)
    before = engine.scheduler.stats().cached_prompt_tokens
    assert engine.generate(case.prompts) == first == case.expected
    assert engine.scheduler.stats().cached_prompt_tokens > before


def test_chunked_prefill_of_every_size(case: Case) -> None:
    params = msgspec.structs.replace(GREEDY, max_tokens=4)
    for chunk in (*range(1, 40), 64, 99):
        case.engine.restart(prefill_chunk_tokens=chunk)
        found = case.engine.generate([case.prompts[7], case.prompts[4]], params)
        assert found == [case.expected[7][:4], case.expected[4][:4]], f"chunks of {chunk} tokens"


def test_when_pages_run_out(case: Case) -> None:
    engine = InProcessEngine(case.folder, kv_pages=16, context_length=200)
    assert engine.generate(case.prompts) == case.expected
    assert engine.scheduler.stats().retractions > 0


def test_logprobs_of_the_prompt_within_1e_4(case: Case) -> None:
    prompt = case.prompts[7]
    expected = reference_logprobs(case.reference, prompt)
    params = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=20, logprobs=20)
    for chunk in (512, 7):
        case.engine.restart(prefill_chunk_tokens=chunk)
        request_id = case.engine.submit(prompt, params)
        (delta,) = case.engine.deltas()[request_id]
        assert delta.prompt_logprobs is not None and delta.prompt_logprobs[0] is None
        assert delta.logprobs is not None
        found = [*delta.prompt_logprobs[1:], delta.logprobs[0]]
        assert len(found) == len(prompt)
        for position, entry in enumerate(found):
            assert entry is not None
            row = expected[position]
            assert entry.token_id == (prompt[position + 1] if position + 1 < len(prompt) else delta.ids[0])
            assert abs(entry.logprob - row[entry.token_id]) < 1e-4
            # tokens closer than the tolerance may stand in either order
            fewest, most = (int((row > row[entry.token_id] + slack).sum()) for slack in (1e-4, -1e-4))
            assert fewest <= entry.rank <= most
            assert torch.allclose(torch.tensor(entry.top_logprobs), row.topk(20).values, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"attention_backend": "torch_reference", "moe_backend": "torch"}, {"dtype": "bfloat16"}]
)
def test_the_layers_composed_of_torch_operators(case: Case, settings: dict[str, str]) -> None:
    """The path for dtypes without a CPU kernel. In float32 it must agree; in bfloat16 logits only come as
    close to the float32 ones as transformers' own in bfloat16 do."""
    engine = InProcessEngine(case.folder, **settings)
    kernels = {op: {row.kernel for row in engine.ready.ledger if op in row.op} for op in ("attention", "moe")}
    assert kernels == {"attention": {"torch"}, "moe": {"torch"}}
    if "dtype" not in settings:
        assert engine.generate(case.prompts) == case.expected
        return
    assert all(row.fallback for row in engine.ready.ledger)
    params = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    narrow = load_reference(case.folder, torch.bfloat16)
    ours, theirs = [], []
    for prompt in case.prompts[5:]:
        request_id = engine.submit(prompt, params)
        (delta,) = engine.deltas()[request_id]
        assert delta.prompt_logprobs is not None
        following = torch.tensor(prompt[1:]).unsqueeze(-1)
        exact, rounded = (
            reference_logprobs(model, prompt)[:-1].gather(1, following).squeeze(-1)
            for model in (case.reference, narrow)
        )
        found = torch.tensor([entry.logprob for entry in delta.prompt_logprobs[1:] if entry is not None])
        ours.append((found - exact).abs())
        theirs.append((rounded - exact).abs())
    # a token near the border between two experts may be routed otherwise: then its error is large, in both
    assert torch.cat(ours).median() < 1.5 * torch.cat(theirs).median()
    assert torch.cat(ours).mean() < 2 * torch.cat(theirs).mean()
