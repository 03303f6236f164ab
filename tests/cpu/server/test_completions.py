from __future__ import annotations

import pytest

from tests.cpu.server.conftest import error_of, events, says


def test_every_shape_of_prompt(serve, tokenizer):
    server = serve(says(tokenizer, " end"))
    ids, other = tokenizer.encode("def f("), tokenizer.encode("class")
    for prompt, expected in [
        ("def f(", [ids]),
        (["def f(", "class"], [ids, other]),
        (ids, [ids]),
        ([ids, other], [ids, other]),
    ]:
        server.engine.generated.clear()
        reply = server.complete(prompt, n=2).json()
        assert [request.prompt_ids for request in server.engine.generated] == [
            i for i in expected for _ in range(2)
        ]
        assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(expected)))
        assert {choice["text"] for choice in reply["choices"]} == {" end"}
        assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(len(i) // 2 for i in expected)
        assert reply["usage"]["completion_tokens"] == 2 * len(expected) * (len(tokenizer.encode(" end")) + 1)
    assert reply["object"] == "text_completion"


def test_max_tokens_is_16_by_default(serve, tokenizer):
    server = serve(says(tokenizer, "abc ", ends=False))
    reply = server.complete().json()
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


def test_echo_with_logprobs_is_what_lm_eval_reads(serve, tokenizer):
    """tokens, token_logprobs and top_logprobs with null first, text_offset into the echoed text."""
    server = serve(says(tokenizer, " done", ends=False))
    prompt = "naïve 🔥 code"
    ids = tokenizer.encode(prompt)
    answer_ids = tokenizer.encode(" done")[:1]
    for sent in (prompt, ids):
        reply = server.complete(sent, echo=True, logprobs=1, max_tokens=1, temperature=0).json()
        [choice] = reply["choices"]
        assert choice["text"] == prompt + tokenizer.decode(answer_ids)
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [None] + [-id / 4096 for id in [*ids[1:], *answer_ids]]
        assert logprobs["top_logprobs"][0] is None
        assert [max(top.values()) for top in logprobs["top_logprobs"][1:]] == logprobs["token_logprobs"][1:]
        for token, top in list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))[1:]:
            assert token == max(top, key=top.get)  # how lm-eval tells a greedy token
        whole = [token for token in logprobs["tokens"] if not token.startswith("bytes:")]
        assert all(token in choice["text"] for token in whole)
        characters = [len(tokenizer.decode(ids[:count]).rstrip("�")) for count in range(len(ids) + 1)]
        assert logprobs["text_offset"] == characters


def test_token_that_is_not_utf8_is_named_by_its_bytes(serve, tokenizer):
    ids = tokenizer.encode("🔥")
    assert len(ids) > 1, "the test needs a character of several tokens"
    server = serve(says(tokenizer, "x"))
    reply = server.complete(ids, echo=True, logprobs=0, max_tokens=0).json()
    names = ["bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(id)) for id in ids]
    assert reply["choices"][0]["logprobs"]["tokens"] == names
    assert reply["choices"][0]["logprobs"]["text_offset"] == [0] * len(ids)
    assert reply["choices"][0]["text"] == "🔥"


def test_echo_without_generation(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    reply = server.complete("hello", echo=True, max_tokens=0).json()
    assert reply["choices"][0] == {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "length"}
    assert reply["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("step_tokens", [1, 3])
def test_stream_with_echo_and_logprobs_equals_whole(serve, tokenizer, step_tokens):
    server = serve(says(tokenizer, " streams 🔥 and ends"), step_tokens=step_tokens)
    asked = {"echo": True, "logprobs": 2, "max_tokens": 30}
    [whole] = server.complete("say:", **asked).json()["choices"]
    *chunks, done = events(server.complete("say:", **asked, stream=True).text)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "say: streams 🔥 and ends"
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for choice in choices for entry in choice["logprobs"][name]] == whole["logprobs"][name]


def test_several_prompts_stream_in_one_stream(serve, tokenizer):
    server = serve(lambda prompt_ids, params: [*prompt_ids, 0])  # says back what it was told
    *chunks, usage, _ = events(
        server.complete(["alpha", "beta", "gamma"], stream=True, stream_options={"include_usage": True}).text
    )
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert list(texts.values()) == ["alpha", "beta", "gamma"]
    assert usage["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts.values())


def test_best_of_only_where_it_changes_nothing(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    assert server.complete(best_of=2, n=2).status_code == 200
    refused = server.complete(best_of=3, n=2)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "best_of"
    assert error_of(refused)["code"] == "unsupported_parameter"


def test_special_tokens_are_shown_only_when_asked(serve, tokenizer):
    [user] = tokenizer.encode("<|user|>")
    server = serve(lambda prompt_ids, params: [*tokenizer.encode("a"), user, *tokenizer.encode("b"), 0])
    assert server.complete().json()["choices"][0]["text"] == "ab"
    assert server.complete(skip_special_tokens=False).json()["choices"][0]["text"] == "a<|user|>b"
    shown = server.complete(skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.json()["choices"][0]["text"] == "a<|user|>b<|endoftext|>"
    offsets = server.complete(logprobs=0).json()["choices"][0]["logprobs"]["text_offset"]
    assert offsets == [0, 1, 1, 2]


def test_tokenize_and_detokenize_are_inverse(serve, tokenizer):
    server = serve(says(tokenizer, "x"))
    post = server.client.post
    text = "def naïve(🔥):  <|user|>"
    reply = post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == tokenizer.encode(text)
    assert reply["count"] == len(reply["tokens"])
    assert reply["max_model_len"] == 256
    assert reply["token_strs"] == [tokenizer.token_string(id) for id in reply["tokens"]]
    assert post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}

    chat = post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    server.chat()
    assert chat["tokens"] == server.engine.generated[-1].prompt_ids
    assert chat["token_strs"] is None
    bare = post(
        "/tokenize", json={"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    )
    assert chat["tokens"][: bare.json()["count"]] == bare.json()["tokens"]
    assert bare.json()["count"] < chat["count"]


def streamed(reply):
    return [event for event in events(reply.text) if event != "[DONE]"]


def test_token_ids_when_asked_for_and_only_then(serve, tokenizer):
    """vLLM's return_token_ids: every id once, also of tokens whose text is held back or hidden."""
    server = serve(says(tokenizer, "naïve 🔥 end"))
    prompt, said = tokenizer.encode("def f("), tokenizer.encode("naïve 🔥 end")
    whole = server.complete("def f(", return_token_ids=True).json()["choices"][0]
    assert whole["prompt_token_ids"] == prompt and whole["token_ids"][: len(said)] == said
    choices = [
        event["choices"][0]
        for event in streamed(server.complete("def f(", return_token_ids=True, stream=True))
    ]
    assert [id for choice in choices for id in choice["token_ids"]] == whole["token_ids"]
    assert [choice.get("prompt_token_ids") for choice in choices] == [prompt] + [None] * (len(choices) - 1)
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert "token_ids" not in server.complete("def f(").text


def test_token_ids_of_a_chat(serve, tokenizer):
    server = serve(says(tokenizer, "naïve 🔥 end"))
    whole = server.chat(return_token_ids=True).json()
    [generated] = server.engine.generated[-1:]
    assert whole["prompt_token_ids"] == generated.prompt_ids
    found = streamed(server.chat(return_token_ids=True, stream=True))
    assert [event.get("prompt_token_ids") for event in found] == [generated.prompt_ids] + [None] * (
        len(found) - 1
    )
    ids = [id for event in found for id in event["choices"][0]["token_ids"]]
    assert ids == whole["choices"][0]["token_ids"] and ids
    assert "token_ids" not in server.chat().text
