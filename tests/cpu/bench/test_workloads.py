"""What each workload sends: lengths, numbers, times and shared beginnings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from firebox.bench.base import Message, Phase, Session
from firebox.bench.prompts import Prompts
from firebox.bench.tokens import LocalVocabulary
from firebox.bench.workloads.base import Options, workload
from firebox.errors import ConfigError
from firebox.find import names

NAMES = [name for name in names("bench.workloads") if name != "base"]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": "Hello?"},
            {"from": "gpt", "value": "Hello!"},
            {"from": "human", "value": "And now?"},
        ]
    },
    {"conversations": [{"from": "gpt", "value": "nobody asked"}]},
]


@pytest.fixture(scope="module")
def vocabulary() -> LocalVocabulary:
    return LocalVocabulary("firebox-tiny")


@pytest.fixture(scope="module")
def shared(vocabulary: LocalVocabulary) -> Prompts:
    return Prompts(vocabulary, seed=3)


@pytest.fixture
def prompts(shared: Prompts) -> Prompts:
    shared.seed(3)
    return shared


def made(name: str, prompts: Prompts, **options: object) -> list[Phase]:
    found = workload(name)
    return found.phases(prompts, Options(**{**found.DEFAULTS, **options}))


def first_prompts(phase: Phase) -> list[tuple[int, ...]]:
    return [session.asks[0].prompt for session in phase.sessions]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(SHAREGPT))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_has_the_same_rows_each_time_and_other_prompts(
    name: str, prompts: Prompts, dataset: Path
) -> None:
    options = dict(concurrency=(2,), depth_tokens=(0, 40), prompt_tokens=(20,), file=dataset, turns=2)
    first = made(name, prompts, **options)
    prompts.seed(4)
    second = made(name, prompts, **options)
    assert [(p.axes, p.concurrency, p.requests) for p in first] == [
        (p.axes, p.concurrency, p.requests) for p in second
    ]
    assert all(phase.workload == name and phase.sessions for phase in first)
    if name != "dataset":
        assert first[0].sessions[0].asks[0] != second[0].sessions[0].asks[0]


def test_prompts_are_exactly_as_long_as_asked_and_begin_unlike(prompts: Prompts) -> None:
    [phase] = made("concurrency", prompts, concurrency=(8,), prompt_tokens=(700,), requests=4)
    found = first_prompts(phase)
    assert {len(ids) for ids in found} == {700} and phase.requests == 32
    assert len({ids[:16] for ids in found}) >= 31  # a page of a prefix cache


def test_text_prompts_of_a_chat_are_as_long_as_asked(vocabulary: LocalVocabulary) -> None:
    chat = Prompts(vocabulary, seed=3, chat=True)
    ask = chat.ask(200, 10, chat.prefix("shared", 50))
    system, user = ask.messages
    assert (system.role, user.role) == ("system", "user")
    assert len(vocabulary.encode(user.content)) == pytest.approx(200, abs=3)
    assert len(vocabulary.encode(system.content)) == pytest.approx(50, abs=3)


def test_without_a_vocabulary_length_follows_characters() -> None:
    text = Prompts(None, seed=1, chars_per_token=2.5).ask(100, 10).prompt
    assert isinstance(text, str) and len(text) == 250


def test_random_ids_are_drawn_evenly_from_those_that_occur(vocabulary: LocalVocabulary) -> None:
    drawn = Prompts(vocabulary, seed=1, random_ids=True).ids(20_000)
    counts = np.bincount(drawn)
    assert (counts > 0).sum() > 1000 and counts.max() < 60


def test_a_context_is_sent_before_prompts_that_begin_with_it(prompts: Prompts) -> None:
    cold, warm = made(
        "prompt_depth", prompts, depth_tokens=(64,), prompt_tokens=(16,), concurrency=(2,), output_tokens=(8,)
    )
    contexts = first_prompts(cold)
    assert (cold.axes["kind"], warm.axes["kind"]) == ("context", "prompt") and cold.warm == ()
    assert [session.asks[0].prompt for session in warm.warm] == contexts
    assert [session.asks[0].max_tokens for session in warm.warm] == [1, 1]
    assert [ids[:64] for ids in first_prompts(warm)] == contexts
    assert {len(ids) for ids in first_prompts(warm)} == {80} and contexts[0] != contexts[1]


def test_spark_arena_v2_has_its_104_figures(prompts: Prompts) -> None:
    phases = made("spark-arena-v2", prompts)
    assert 2 * len(phases) == 104  # a prefill and a decode figure each
    assert {(p.axes["prompt_tokens"], p.axes["output_tokens"]) for p in phases} == {(2048, 128)}
    assert {p.concurrency for p in phases} == {1, 2, 5, 10}
    deep = [p for p in phases if p.axes["depth_tokens"] == 100000 and p.axes["kind"] == "prompt"]
    assert [len(ids) for ids in first_prompts(deep[0])] == [102048]


def test_phases_beyond_the_context_are_left_out(prompts: Prompts) -> None:
    phases = made("prompt_depth", prompts, context_tokens=5000)
    assert {p.axes["depth_tokens"] for p in phases} == {0, 4096}


def test_poisson_arrivals_have_the_rate_and_no_memory(prompts: Prompts) -> None:
    [phase] = made("poisson", prompts, rates_per_s=(4.0,), requests=4000, prompt_tokens=(1,))
    starts = np.array([session.starts_s for session in phase.sessions])
    gaps = np.diff(starts)
    assert starts[0] == 0 and gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(0.25, rel=0.08)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.05


def test_bursts_come_together_at_the_same_mean_rate(prompts: Prompts) -> None:
    [phase] = made("bursty", prompts, rates_per_s=(4.0,), requests=4000, prompt_tokens=(1,))
    starts = [session.starts_s for session in phase.sessions]
    groups = [starts[n : n + 8] for n in range(0, len(starts), 8)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len(starts) / starts[-1] == pytest.approx(4.0, rel=0.1)


def test_groups_share_a_beginning_of_their_own(prompts: Prompts) -> None:
    [phase] = made("shared_prefix", prompts, concurrency=(2,), depth_tokens=(100,), prompt_tokens=(10,))
    found = first_prompts(phase)
    assert len(found) == 16 and len({ids[:100] for ids in found}) == 2
    assert len({ids[:100] for ids in found[:8]}) == 1 and len(set(found)) == 16


def test_an_agent_sends_turns_that_end_where_the_model_likes(prompts: Prompts) -> None:
    [phase] = made("agent", prompts, concurrency=(1,), turns=3)
    [first, *later] = phase.sessions[0].asks
    assert [message.role for message in first.messages] == ["system", "user"]
    assert [len(ask.messages) for ask in later] == [1, 1] and all(ask.open_ended for ask in later)
    assert phase.sessions[0].pause_s > 0 and phase.requests == 6


def test_sharegpt_and_json_lines(tmp_path: Path, prompts: Prompts, dataset: Path) -> None:
    found = workload("dataset").read(dataset, 64, 2)
    assert [ask.messages for ask in found[0].asks] == [
        (Message("user", "Hello?"),),
        (Message("user", "And now?"),),
    ]
    assert len(found) == 1
    lines = tmp_path / "asks.jsonl"
    lines.write_text('{"prompt": "a", "max_tokens": 5}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    one, two = workload("dataset").read(lines, 64, 1)
    assert (one.asks[0].prompt, one.asks[0].max_tokens) == ("a", 5)
    assert isinstance(two, Session) and two.asks[0].messages == (Message("user", "b"),)


@pytest.mark.parametrize("text", ["", "[]", "no json", '{"neither": 1}', "[{}]"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        workload("dataset").read(file, 64, 1)


def test_an_unknown_workload_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no workload 'sharegpt'") as caught:
        workload("sharegpt")
    assert caught.value.hint is not None and "spark-arena-v2" in caught.value.hint
