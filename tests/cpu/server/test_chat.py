from __future__ import annotations

import pytest

from firebox.text.templates import chat_ids
from tests.cpu.server.conftest import events, says

HI = [{"role": "user", "content": "hi"}]
TEXT = "naïve 日本 🔥 done"


def test_reply_has_text_usage_and_reason(serve, tokenizer):
    server = serve(says(tokenizer, TEXT))
    reply = server.chat(max_tokens=100).json()
    prompt_tokens = len(chat_ids(tokenizer, HI))
    answer_tokens = len(tokenizer.encode(TEXT)) + 1  # the end-of-sequence token counts
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "firebox-tiny"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2},
    }
    assert server.engine.generated[0].prompt_ids == chat_ids(tokenizer, HI)


@pytest.mark.parametrize("step_tokens", [1, 2, 7, 1000])
def test_stream_equals_whole(serve, tokenizer, step_tokens):
    server = serve(says(tokenizer, TEXT), step_tokens=step_tokens)
    *chunks, done = events(server.chat(stream=True, max_tokens=100).text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks] == ["assistant"] + [None] * (
        len(chunks) - 1
    )
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert not any("usage" in chunk for chunk in chunks)
    assert not any("�" in chunk["choices"][0]["delta"]["content"] for chunk in chunks)


def test_include_usage_adds_one_chunk_without_choices(serve, tokenizer):
    server = serve(says(tokenizer, TEXT))
    whole = server.chat(max_tokens=100).json()
    *chunks, last, done = events(
        server.chat(stream=True, stream_options={"include_usage": True}, max_tokens=100).text
    )
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]


def test_a_chunk_holds_all_that_has_arrived(serve, tokenizer):
    """Merging: a fast engine must not cost a chunk a token."""
    text = "word " * 60
    server = serve(says(tokenizer, text), step_tokens=30)
    *chunks, _ = events(server.chat(stream=True, max_tokens=200).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert len(chunks) < len(tokenizer.encode(text)) / 10


def test_n_choices_have_their_own_seeds_and_all_count(serve, tokenizer):
    texts = {5: "five", 6: "six and more", 7: "seven"}
    server = serve(lambda prompt_ids, params: [*tokenizer.encode(texts[params.seed]), 0])
    reply = server.chat(n=3, seed=5, max_tokens=50).json()
    assert [choice["message"]["content"] for choice in reply["choices"]] == list(texts.values())
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    prompt_tokens = len(chat_ids(tokenizer, HI))
    assert reply["usage"]["prompt_tokens"] == prompt_tokens
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt_tokens // 2
    assert reply["usage"]["completion_tokens"] == sum(
        len(tokenizer.encode(text)) + 1 for text in texts.values()
    )

    *chunks, _ = events(server.chat(n=3, seed=5, max_tokens=50, stream=True).text)
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
    assert list(streamed.values()) == list(texts.values())


@pytest.mark.parametrize("step_tokens", [1, 5])
def test_stop_string_across_tokens_ends_the_answer_and_the_engine_request(serve, tokenizer, step_tokens):
    """Also where the engine has sent more than the token that completed it: the rest is not counted."""
    reply = says(tokenizer, "one two three four", ends=False)
    server = serve(reply, step_s=0.001, step_tokens=step_tokens)
    reply = server.chat(stop=["three"], max_tokens=200, logprobs=True).json()
    assert len(reply["choices"][0]["logprobs"]["content"]) == reply["usage"]["completion_tokens"]
    assert reply["choices"][0]["message"]["content"] == "one two "
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert server.engine.aborted == [0]
    used = reply["usage"]["completion_tokens"]
    ids = tokenizer.encode("one two three four")
    assert "three" in tokenizer.decode(ids[:used])
    assert "three" not in tokenizer.decode(ids[: used - 1])

    included = server.chat(stop="three", include_stop_str_in_output=True, max_tokens=200).json()
    assert included["choices"][0]["message"]["content"] == "one two three"
    *chunks, _ = events(server.chat(stop="three", stream=True, max_tokens=200).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "one two "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_logprobs_have_bytes_and_candidates(serve, tokenizer):
    server = serve(says(tokenizer, "é!"))
    ids = [*tokenizer.encode("é!"), 0]
    reply = server.chat(logprobs=True, top_logprobs=2, max_tokens=20).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content] == [tokenizer.token_bytes(id) for id in ids]
    assert [entry["logprob"] for entry in content] == [-id / 4096 for id in ids]
    assert [bytes(top["bytes"]) for top in content[0]["top_logprobs"]] == [
        tokenizer.token_bytes(ids[0]),
        tokenizer.token_bytes(ids[0] + 1),
    ]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-ids[0] / 4096, -(ids[0] + 4096) / 4096]

    *chunks, _ = events(server.chat(logprobs=True, top_logprobs=2, max_tokens=20, stream=True).text)
    assert [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]] == content
    bare = server.chat(logprobs=True, max_tokens=20).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * len(ids)


def test_every_sampling_field_reaches_the_engine(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    fields = {
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 1.25,
        "seed": 11,
        "ignore_eos": True,
    }
    answer = server.chat(
        **fields, max_completion_tokens=9, logit_bias={"17": 2.5}, stop_token_ids=[3, 4], priority=-2
    )
    assert answer.status_code == 200, answer.text
    request = server.engine.generated[0]
    for name, value in fields.items():
        assert getattr(request.params, name) == value, name
    assert request.params.max_tokens == 9
    assert request.params.logit_bias == {17: 2.5}
    assert request.params.stop_token_ids == (3, 4)
    assert request.priority == -2


def test_defaults_come_from_the_checkpoint_and_then_from_openai(serve, tokenizer):
    server = serve(says(tokenizer, "x"), defaults={"temperature": 0.25, "top_k": 5})
    server.chat()
    server.chat(temperature=2, top_k=-1)
    first, second = (request.params for request in server.engine.generated)
    assert (first.temperature, first.top_k, first.top_p) == (0.25, 5, 1.0)
    assert (second.temperature, second.top_k) == (2.0, 0)
    assert first.max_tokens == 256 - len(server.engine.generated[0].prompt_ids)
    assert server.client.get("/ledger").json()["settings"]["sampling_defaults"] == {
        "temperature": 0.25,
        "top_k": 5,
    }


def test_text_parts_and_roles(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    assert server.chat(messages=messages).status_code == 200
    joined = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb"}]
    assert server.engine.generated[0].prompt_ids == chat_ids(tokenizer, joined)


def test_inert_fields_are_accepted(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    inert = {
        "user": "u",
        "metadata": {"k": "v"},
        "store": False,
        "safety_identifier": "s",
        "prompt_cache_key": "p",
    }
    assert server.chat(**inert, response_format={"type": "text"}).status_code == 200
    assert server.chat(store=True).status_code == 400
