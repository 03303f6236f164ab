"""The real `openai` client against a real server process with the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import httpx
import openai
import pytest

from tests.support.server_process import wait_for

MODEL = "firebox-tiny"
PROMPT = "def fibonacci(n):\n"
CHAT = [{"role": "user", "content": "def add(a, b):"}]


def complete(client, prompt=PROMPT, **asked):
    return client.completions.create(
        model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 24, **asked}
    )


def chat(client, messages=CHAT, **asked):
    asked = {"temperature": 0, "max_tokens": 24, **asked}
    return client.chat.completions.create(model=MODEL, messages=messages, **asked)


def ids_of(server, prompt: str) -> list[int]:
    return httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "firebox"


def test_chat_streamed_equals_whole(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content for chunk in chunks[:-1])
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == text
    assert len(text) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completion_streamed_equals_whole(client):
    whole = complete(client, max_tokens=100)
    chunks = list(complete(client, max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_stream_comes_while_it_is_generated(server, client):
    """Told by what the server is still doing, not by the number of pieces: a server that gets little
    processor sends several tokens in one."""
    before = server.metrics()["firebox_generated_tokens_total"]
    with complete(client, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}) as chunks:
        assert next(iter(chunks)).choices[0].text
        metrics = server.metrics()
    assert metrics["firebox_requests_running"] == 1
    assert metrics["firebox_generated_tokens_total"] < before + 3000
    wait_for(lambda: server.metrics()["firebox_requests_running"] == 0, 10)


def test_the_model_has_learnt_python(client):
    """Trained on CPython's library: what it writes is indented code, not noise."""
    text = complete(client, "class Counter:\n    def __init__(self", max_tokens=48).choices[0].text
    assert "self." in text
    assert "\n        " in text


def test_usage_is_exact(server, client):
    reply = complete(client, max_tokens=17, extra_body={"ignore_eos": True})
    assert reply.usage.prompt_tokens == len(ids_of(server, PROMPT))
    assert reply.usage.completion_tokens == 17
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 17
    before = server.metrics()["firebox_generated_tokens_total"]
    complete(client, max_tokens=17, extra_body={"ignore_eos": True})
    assert server.metrics()["firebox_generated_tokens_total"] == before + 17


def test_a_repeated_prompt_comes_from_the_cache_and_answers_the_same(server, client):
    prompt = "".join(f"value_{number} = compute({number})\n" for number in range(60))
    first, second = complete(client, prompt), complete(client, prompt)
    prompt_tokens = first.usage.prompt_tokens
    assert prompt_tokens > 300
    assert first.usage.prompt_tokens_details.cached_tokens < 64
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert prompt_tokens - 32 < cached < prompt_tokens
    assert second.choices[0].text == first.choices[0].text


def test_prompts_as_text_and_ids_and_in_a_batch_agree(server, client):
    other = "import os\n"
    texts = [complete(client, prompt).choices[0].text for prompt in (PROMPT, other)]
    ids = [ids_of(server, prompt) for prompt in (PROMPT, other)]
    assert [complete(client, prompt).choices[0].text for prompt in ids] == texts
    assert [choice.text for choice in complete(client, [PROMPT, other]).choices] == texts
    assert [choice.text for choice in complete(client, ids).choices] == texts


def test_echo_scores_what_was_generated_with_the_same_logprobs(client):
    """What lm-eval does: a continuation has the same logprobs generated or given."""
    generated = complete(client, logprobs=3, max_tokens=12, extra_body={"ignore_eos": True}).choices[0]
    scored = complete(client, PROMPT + generated.text, echo=True, logprobs=3, max_tokens=1).choices[0]
    tokens = generated.logprobs.tokens
    prompt_tokens = len(scored.logprobs.tokens) - 1 - len(tokens)
    assert scored.logprobs.tokens[prompt_tokens:-1] == tokens, "the text must cut into the same tokens"
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.top_logprobs[0] is None
    again = scored.logprobs.token_logprobs[prompt_tokens:-1]
    assert again == pytest.approx(generated.logprobs.token_logprobs, abs=2e-3)
    for token, top in zip(tokens, generated.logprobs.top_logprobs, strict=True):
        assert token == max(top, key=top.get), "greedy takes the most likely"
        assert len(top) == 3
    assert scored.text.startswith(PROMPT + generated.text)
    for offset, token in zip(scored.logprobs.text_offset, scored.logprobs.tokens, strict=True):
        assert scored.text[offset:].startswith(token)


def test_chat_logprobs(client):
    choice = chat(client, logprobs=True, top_logprobs=2, max_tokens=6).choices[0]
    assert (
        b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content
    )
    for entry in choice.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob > entry.top_logprobs[1].logprob


def test_stop_strings(client):
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[5:8]
    whole = complete(client, max_tokens=40, stop=[stop]).choices[0]
    assert whole.text == text[: text.index(stop)]
    assert whole.finish_reason == "stop"
    streamed = "".join(c.choices[0].text for c in complete(client, max_tokens=40, stop=[stop], stream=True))
    assert streamed == whole.text


def test_n_and_seed(client):
    asked = {"temperature": 1.0, "max_tokens": 12}
    together = [choice.text for choice in complete(client, seed=40, n=3, **asked).choices]
    alone = [complete(client, seed=40 + number, **asked).choices[0].text for number in range(3)]
    assert together == alone
    assert len(set(together)) == 3
    assert [choice.text for choice in complete(client, seed=40, n=3, **asked).choices] == together


def test_logit_bias_and_penalties_change_the_answer(server, client):
    first = complete(client, max_tokens=1, logprobs=1).choices[0].logprobs.tokens[0]
    [token_id] = ids_of(server, first)
    other = complete(client, max_tokens=1, logit_bias={str(token_id): -100}).choices[0].text
    assert other != first

    def most_repeated(**asked):
        asked = {"max_tokens": 64, "logprobs": 0, "extra_body": {"ignore_eos": True}, **asked}
        choice = complete(client, "x = [" + "1, " * 40, **asked).choices[0]
        return max(Counter(choice.logprobs.tokens).values())

    assert most_repeated(frequency_penalty=2) < most_repeated()


def test_errors_are_the_clients_exceptions(server, client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        complete(client, [5] * 5000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unsupported:
        chat(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (unsupported.value.param, unsupported.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.RateLimitError) as full:
        complete(client, n=17)
    assert full.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.APIStatusError) as large:
        complete(client, "a" * 200_000)
    assert large.value.status_code == 413
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405


def test_sixteen_at_once_answer_as_one_alone(server, client):
    prompts = [f"# number {number}\ndef function_{number}(" for number in range(16)]
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    together = complete(client, prompts)
    assert [choice.text for choice in together.choices] == alone


def test_ledger(server):
    ledger = httpx.get(f"{server.url}/ledger").json()
    assert ledger["model"] == MODEL
    assert ledger["settings"]["engine"]["max_running_requests"] == 8
    assert {row["op"] for row in ledger["ledger"]}
    assert ledger["reasons"]


def test_generate_on_the_command_line_gives_the_same_answer(client):
    command = [sys.executable, "-m", "firebox", "generate", "--prompt", "-", "--max-tokens", "24"]
    done = subprocess.run(
        [*command, "--temperature", "0", "--json"],
        input=PROMPT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["text"] == complete(client).choices[0].text
    assert done.stdout.startswith(document["text"])
    assert len(document["ids"]) == 24
    assert document["finish_reason"] == "length"
    assert document["model"] == MODEL
    assert document["cached_tokens"] == 0
    assert 0 < document["ttft_ms"] < 1000 * document["load_s"]
    assert document["tokens_per_s"] > 10
    assert document["prompt_ids"]
