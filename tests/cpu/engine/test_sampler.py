"""The sampler against plain Python: known answers for the random numbers, exact distributions for the choice.

The draw is a race over scores (kernels/cpu_race.py, tested by its own contract test), so a distribution is
checked without statistics: the softmax of the scores that reach the race must be what the formula, written
out here in plain Python, says. Chi-square tests then close the loop with the real random numbers.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from firebox.engine import sampler
from firebox.engine.messages import SamplingParams
from firebox.engine.request import Request
from firebox.engine.sampler import sample, token_logprobs
from firebox.kernels import cpu_race

NO_EOS: frozenset[int] = frozenset()


def request(params: SamplingParams, prompt: Sequence[int] = (1, 2, 3), output: Sequence[int] = ()) -> Request:
    """A request that has already produced `output`."""
    made = Request(0, list(prompt), params)
    made.token_ids += output
    return made


# ---- random numbers

# Random123's kat_vectors: counter, key → output of Philox4x32-10
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
# seed, position → word 0 of triton.language.philox (Triton 3.9): what a GPU kernel would draw
TRITON = (
    (0, 1, 0xF8E4CCA4),
    (0, 2, 0x04FAA329),
    (0, 3, 0xC990EF29),
    (0x0123456789ABCDEF, 0, 0xB850222E),
    (0x0123456789ABCDEF, 1 << 40, 0x3D094AF0),
    (0x0123456789ABCDEF, 2, 0xF7CE299F),
    (0x0123456789ABCDEF, 3, 0xAC3078F0),
)


def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """The paper's round, on all four words: multiply, swap halves, xor the neighbour and the round's key."""
    words = list(counter)
    for number in range(10):
        left, right = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        keys = [(key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32]
        words = [
            (right >> 32) ^ words[1] ^ keys[0],
            right % 2**32,
            (left >> 32) ^ words[3] ^ keys[1],
            left % 2**32,
        ]
    return tuple(words)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_philox_written_here_gives_the_published_answers(counter, key, expected) -> None:
    assert philox4x32_10(counter, key) == expected


def words(seed: int, position: int, block: int) -> tuple[int, ...]:
    """What the kernel draws for tokens 4 · block … 4 · block + 3."""
    found = np.empty(4, np.uint64)
    cpu_race.philox(np.uint64(seed % 2**64), np.uint64(position), np.uint64(block), found)
    return tuple(found.tolist())


def test_the_kernels_philox_gives_the_published_answers() -> None:
    for counter, key, expected in KNOWN_ANSWERS:
        seed, position, block = (low + (high << 32) for low, high in (key, counter[:2], counter[2:]))
        assert words(seed, position, block) == expected
    for seed, position, word in TRITON:
        assert words(seed, position, 0)[0] == word


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=500, deadline=None)
def test_philox_for_any_seed_position_and_block(seed: int, position: int, block: int) -> None:
    counter = (position % 2**32, position >> 32, block % 2**32, block >> 32)
    assert words(seed, position, block) == philox4x32_10(counter, (seed % 2**32, (seed >> 32) % 2**32))


# ---- what plain Python says


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def adjusted_logits(
    logits: Sequence[float], made: Request, eos_token_ids: frozenset[int] = NO_EOS
) -> list[float]:
    """Penalties, bias and bans one token at a time, as OpenAI and vLLM document them."""
    params = made.params
    output = made.token_ids[made.prompt_tokens :]
    changed = []
    for token_id, logit in enumerate(logits):
        value = logit
        if token_id in made.token_ids:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (1 if token_id in output else 0)
        value += params.logit_bias.get(token_id, 0.0)
        stops = token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)
        if stops and len(output) < params.min_tokens:
            value = -math.inf
        changed.append(value)
    return changed


def filtered(probabilities: Sequence[float], top_k: int, top_p: float, min_p: float) -> list[float] | None:
    """Each filter by its definition, over what the one before has left; None if rounding decides."""
    kept = set(range(len(probabilities)))
    if 0 < top_k < len(probabilities):
        kept = {t for t in kept if sum(p > probabilities[t] for p in probabilities) < top_k}
    total = sum(probabilities[t] for t in kept)
    if top_p < 1.0:
        before, nucleus = 0.0, set()
        for t in sorted(kept, key=lambda t: (-probabilities[t], t)):
            if abs(before / total - top_p) < 1e-5:
                return None
            if before / total >= top_p:
                break
            nucleus.add(t)
            before += probabilities[t]
        kept = nucleus
    if min_p > 0.0:
        top = max(probabilities[t] for t in kept)
        if any(probabilities[t] < top and abs(probabilities[t] / top - min_p) < 1e-5 for t in kept):
            return None
        kept = {t for t in kept if probabilities[t] >= min_p * top}
    total = sum(probabilities[t] for t in kept)
    return [probabilities[t] / total if t in kept else 0.0 for t in range(len(probabilities))]


def expect_distribution(
    logits: Sequence[float],
    params: SamplingParams,
    expected: Sequence[float],
    *,
    prompt: Sequence[int] = (0,),
    output: Sequence[int] = (),
    eos_token_ids: frozenset[int] = NO_EOS,
) -> None:
    """The race of `sample` is run over scores whose softmax is `expected`."""
    seen: list[torch.Tensor] = []

    def bind(problem: object, weights: object, threads: int):
        return lambda scores, seeds, positions: seen.append(scores.clone()) or [0] * len(seeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.cpu_race, "bind", bind)
        sample(
            torch.tensor([list(logits)]), [request(replace(params, seed=1), prompt, output)], eos_token_ids
        )
    found = seen[0][0].double().softmax(-1)
    assert torch.equal(found > 1e-100, torch.tensor([p > 0 for p in expected])), "other tokens are excluded"
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=2e-6)


# ---- the distribution

# half-integers, so that ties are common and exact
LOGITS = st.lists(st.integers(-12, 12).map(lambda i: i / 2), min_size=1, max_size=24)


@given(LOGITS, st.sampled_from([0.25, 0.5, 1.0, 2.0]))
@settings(max_examples=100, deadline=None)
def test_temperature(logits: list[float], temperature: float) -> None:
    expect_distribution(
        logits, SamplingParams(temperature=temperature), softmax([x / temperature for x in logits])
    )


@given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 27),
    st.one_of(st.just(1.0), st.floats(1e-6, 1.0)),
    st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
)
@settings(max_examples=300, deadline=None)
def test_filters_alone_and_together(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    probabilities = softmax([x / temperature for x in logits])
    expected = filtered(probabilities, top_k, top_p, min_p)
    assume(expected is not None)
    expect_distribution(logits, params, expected)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=1), [0, 0, 1, 0]),
        (SamplingParams(top_k=2), [0, 0.25 / 0.75, 0.5 / 0.75, 0]),
        (SamplingParams(top_k=3), [0.125, 0.25, 0.5, 0.125]),  # a tie at the border is kept whole
        (SamplingParams(top_k=4), [0.125, 0.25, 0.5, 0.125]),
        (SamplingParams(top_k=9), [0.125, 0.25, 0.5, 0.125]),
        (SamplingParams(top_p=1e-9), [0, 0, 1, 0]),  # never empty
        (SamplingParams(top_p=0.49), [0, 0, 1, 0]),
        (SamplingParams(top_p=0.6), [0, 0.25 / 0.75, 0.5 / 0.75, 0]),
        (
            SamplingParams(top_p=0.8),
            [0.125 / 0.875, 0.25 / 0.875, 0.5 / 0.875, 0],
        ),  # of a tie, the smaller id
        (SamplingParams(top_k=2, top_p=0.6), [0, 0, 1, 0]),  # of the two that top_k leaves, the first has 2/3
        (SamplingParams(min_p=1.0), [0, 0, 1, 0]),
        (SamplingParams(min_p=0.4), [0, 0.25 / 0.75, 0.5 / 0.75, 0]),
        (SamplingParams(min_p=0.2), [0.125, 0.25, 0.5, 0.125]),
    ],
)
def test_filters_by_hand(params: SamplingParams, expected: list[float]) -> None:
    expect_distribution([math.log(p) for p in (0.125, 0.25, 0.5, 0.125)], params, expected)


def test_min_p_1_keeps_every_token_that_ties_for_the_top() -> None:
    expect_distribution([2.0, 1.0, 2.0, 2.0], SamplingParams(min_p=1.0), [1 / 3, 0, 1 / 3, 1 / 3])


def test_a_temperature_too_small_for_float32_is_greedy() -> None:
    """The smallest one that `limits.validate` lets through must not turn into a division by zero."""
    logits = [3.0, -50.0, 7.0, 6.5]
    for temperature in (1e-3, 1e-10, 1e-38, 1e-45, 1e-300):
        expect_distribution(logits, SamplingParams(temperature=temperature), [0, 0, 1, 0])


def chi_square_bound(freedom: int) -> float:
    """The value that chi-square exceeds once in a million (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.3, min_p=0.1),
        SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "all"],
)
def test_frequencies_with_the_real_random_numbers(params: SamplingParams) -> None:
    """60 positions of each of 50 seeds; excluded tokens never come, the others as often as they should."""
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 1.5
    requests = [request(replace(params, seed=seed), [0] * n) for seed in range(50) for n in range(1, 61)]
    counts = Counter(sample(logits.repeat(len(requests), 1), requests, NO_EOS))
    probabilities = softmax([float(x) / params.temperature for x in logits])
    probabilities = filtered(probabilities, params.top_k, params.top_p, params.min_p)
    expected = [p * len(requests) for p in probabilities]
    assert set(counts) <= {t for t, count in enumerate(expected) if count > 0}
    cells = [(counts[t], count) for t, count in enumerate(expected) if count >= 5]
    rare = [(counts[t], count) for t, count in enumerate(expected) if 0 < count < 5]
    if rare:
        cells.append((sum(found for found, _ in rare), sum(count for _, count in rare)))
    statistic = sum((found - count) ** 2 / count for found, count in cells)
    assert len(cells) > 2 and statistic < chi_square_bound(len(cells) - 1)


# ---- penalties, bias, bans

IDS = st.lists(st.integers(0, 9), max_size=12)


@given(
    st.lists(st.integers(-12, 12).map(lambda i: i / 2), min_size=10, max_size=10),
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    IDS,
    st.sampled_from([1.0, 0.5, 1.25, 3.0]),
    st.sampled_from([0.0, -2.0, 0.75]),
    st.sampled_from([0.0, -0.5, 0.25, 2.0]),
    st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, -1.5, 2.0, 5.0]), max_size=3),
)
@settings(max_examples=250, deadline=None)
def test_penalties_and_bias(logits, prompt, output, repetition, presence, frequency, bias) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    expected = softmax(adjusted_logits(logits, request(params, prompt, output)))
    expect_distribution(logits, params, expected, prompt=prompt, output=output)


def test_penalties_by_hand() -> None:
    """A mix-up of prompt and output, or of once and often, would change these."""
    logits = [1.0, 1.0, -1.0, 1.0]
    by_hand = (
        (SamplingParams(repetition_penalty=2.0), [0.5, 0.5, -2.0, 1.0]),
        (SamplingParams(presence_penalty=0.5), [1.0, 0.5, -1.5, 1.0]),
        (SamplingParams(frequency_penalty=0.5), [1.0, 0.5, -2.0, 1.0]),
    )
    for params, expected in by_hand:
        expect_distribution(logits, params, softmax(expected), prompt=[0, 1], output=[1, 2, 2])


def test_bias_of_100_forces_and_of_minus_100_bans() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(3)) * 5
    best = int(logits.argmax())
    for temperature in (0.0, 1.0, 2.0):
        for seed in range(20):
            forced = SamplingParams(temperature=temperature, seed=seed, logit_bias={7: 100.0})
            assert sample(logits[None], [request(forced)], NO_EOS) == [7]
            banned = SamplingParams(temperature=temperature, seed=seed, logit_bias={best: -100.0})
            assert sample(logits[None], [request(banned)], NO_EOS) != [best]
    greedy = SamplingParams(temperature=0.0, logit_bias={best: -100.0})
    assert sample(logits[None], [request(greedy)], NO_EOS) == [int(logits.topk(2).indices[1])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("ignore_eos", "made", "banned"),
    [(False, 0, {4, 5}), (False, 1, {4, 5}), (False, 2, set()), (True, 0, {5}), (True, 2, set())],
)
def test_min_tokens_bans_stops_until_there_are_enough(
    temperature: float, ignore_eos: bool, made: int, banned: set[int]
) -> None:
    """Token 4 is an end of sequence, 5 a stop token of the request, and a bias pushes both."""
    params = SamplingParams(
        temperature=temperature,
        min_tokens=2,
        stop_token_ids=(5,),
        ignore_eos=ignore_eos,
        logit_bias={4: 3.0, 5: 4.0},
    )
    logits = [0.5, 0.25, 1.0, 0.0, 1.0, 1.0]
    eos, output = frozenset({4}), [0] * made
    expected = adjusted_logits(logits, request(params, [0], output), eos)
    assert {t for t, value in enumerate(expected) if value == -math.inf} == banned
    if temperature:
        expect_distribution(logits, params, softmax(expected), output=output, eos_token_ids=eos)
    else:
        best = max(range(6), key=expected.__getitem__)
        assert sample(torch.tensor([logits]), [request(params, [0], output)], eos) == [best]


def test_min_tokens_alone_is_enough_to_leave_the_greedy_path() -> None:
    """Nothing else about the request is special, and the end of sequence is the likeliest token."""
    params, logits = SamplingParams(temperature=0.0, min_tokens=2), torch.tensor([[0.0, 2.0, 3.0]])
    found = [sample(logits, [request(params, [0], [0] * made)], frozenset({2})) for made in range(4)]
    assert found == [[1], [1], [2], [2]]


# ---- batches


def kinds() -> list[SamplingParams]:
    """One of each kind of request."""
    return [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, min_tokens=9),
        SamplingParams(temperature=0.0, logit_bias={11: 2.0}),
        SamplingParams(seed=1),
        SamplingParams(seed=1, temperature=0.7),
        SamplingParams(seed=2, top_k=20),
        SamplingParams(seed=3, top_p=0.7, temperature=1.4),
        SamplingParams(seed=-4, min_p=0.05),
        SamplingParams(seed=2**64 - 1, top_k=50, top_p=0.9, min_p=0.01),
        SamplingParams(seed=5, frequency_penalty=0.7, presence_penalty=-0.3),
        SamplingParams(seed=6, min_tokens=9, stop_token_ids=(3, 4), logit_bias={5: -100.0}),
    ]


def test_the_same_seed_gives_the_same_token_in_any_batch() -> None:
    rng = random.Random(0)
    eos = frozenset({0, 17})
    changed_by_seed = 0
    for round_number in range(12):
        logits = torch.randn(12, 1500, generator=torch.Generator().manual_seed(round_number)) * 2
        requests = [
            request(
                params,
                [rng.randrange(1500) for _ in range(rng.randrange(1, 40))],
                [rng.randrange(1500) for _ in range(5)],
            )
            for params in kinds()
        ]
        alone = [sample(logits[i : i + 1], [made], eos)[0] for i, made in enumerate(requests)]
        for _ in range(15):
            chosen = rng.sample(range(12), rng.randrange(1, 13))
            chosen += rng.choices(chosen, k=rng.randrange(4))  # the same request twice
            together = sample(logits[chosen], [requests[i] for i in chosen], eos)
            assert together == [alone[i] for i in chosen]
        other = request(SamplingParams(seed=1001), requests[4].token_ids)
        changed_by_seed += sample(logits[4:5], [other], eos)[0] != alone[4]
    assert changed_by_seed > 8, "the seed does not matter"


def test_the_draw_depends_on_the_position() -> None:
    logits = torch.zeros(1, 1000)
    found = {sample(logits, [request(SamplingParams(seed=9), [0] * n)], NO_EOS)[0] for n in range(1, 60)}
    assert len(found) > 50


def test_a_prompt_and_an_output_of_the_same_length_draw_alike() -> None:
    """A retracted request comes back with the same known tokens, and so with the same next one."""
    logits = torch.zeros(1, 1000)
    params = SamplingParams(seed=9)
    assert sample(logits, [request(params, [1] * 8)], NO_EOS) == sample(
        logits, [request(params, [1] * 3, [1] * 5)], NO_EOS
    )


def test_greedy_is_argmax_alone_and_beside_others() -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
    expected = [max(range(3000), key=row.__getitem__) for row in logits.tolist()]
    greedy = [request(SamplingParams(temperature=0.0)) for _ in range(40)]
    assert sample(logits, greedy, NO_EOS) == expected
    mixed = [made if i % 3 else request(SamplingParams(seed=i)) for i, made in enumerate(greedy)]
    found = sample(logits, mixed, NO_EOS)
    assert [t for i, t in enumerate(found) if i % 3] == [t for i, t in enumerate(expected) if i % 3]


def test_greedy_ties_fall_the_same_way_in_any_batch() -> None:
    logits = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0)).clamp(max=1.0)
    greedy = [request(SamplingParams(temperature=0.0)) for _ in range(9)]
    alone = [sample(logits[i : i + 1], greedy[:1], NO_EOS)[0] for i in range(9)]
    assert sample(logits, greedy, NO_EOS) == alone
    assert sample(logits, [*greedy[:8], request(SamplingParams(seed=1))], NO_EOS)[:8] == alone[:8]


def test_the_logits_stay_as_they_were() -> None:
    logits = torch.randn(12, 1500, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    sample(logits, [request(params, [1, 2], [3, 3]) for params in kinds()], frozenset({0}))
    token_logprobs(logits, [5] * 12, [4] * 12)
    assert torch.equal(logits, before)


def test_sampling_without_a_seed_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="without a seed"):
        sample(torch.zeros(1, 4), [request(SamplingParams())], NO_EOS)


# ---- logprobs


@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_logprobs_equal_the_formula(top: int) -> None:
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(4)) * 3
    token_ids = [int(logits[0].argmax()), int(logits[1].argmin()), 0, 199, 7, 7]
    found = token_logprobs(logits, token_ids, [top] * len(token_ids))
    assert [entry.token_id for entry in found] == token_ids
    for row, token_id, entry in zip(logits.tolist(), token_ids, found, strict=True):
        total = math.log(sum(math.exp(value) for value in row))
        assert entry.logprob == pytest.approx(row[token_id] - total, abs=1e-5)
        assert entry.rank == sum(value > row[token_id] for value in row)
        order = sorted(range(200), key=lambda t, row=row: -row[t])[:top]
        assert entry.top_ids == order
        assert entry.top_logprobs == pytest.approx([row[t] - total for t in order], abs=1e-5)
    assert found[0].rank == 0 and found[1].rank == 199


def test_tied_tokens_share_a_rank() -> None:
    entries = token_logprobs(torch.tensor([[1.0, 3.0, 1.0, 1.0]] * 2), [0, 3], [0, 0])
    assert [entry.rank for entry in entries] == [1, 1]
    assert all(entry.top_ids == entry.top_logprobs == [] for entry in entries)
