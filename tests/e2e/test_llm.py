"""The offline API with the bundled model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

import firebox
from firebox.errors import CheckpointError, ConfigError, ContextTooLong, EngineDied, RequestError
from firebox.llm import LLM, SamplingParams
from tests.e2e.conftest import wait_for

PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Queue:\n"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_running_requests=8) as model:
        yield model


def test_outputs_come_in_order_and_equal_the_server(llm, client):
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        reply = client.completions.create(
            model="firebox-tiny", prompt=output.prompt, temperature=0, max_tokens=24
        )
        [answer] = output.outputs
        assert answer.text == reply.choices[0].text
        assert answer.finish_reason == reply.choices[0].finish_reason
        assert len(answer.token_ids) == reply.usage.completion_tokens
        assert len(output.prompt_token_ids) == reply.usage.prompt_tokens
        assert llm.get_tokenizer().decode(answer.token_ids) == answer.text


def test_prompts_as_ids(llm):
    [text] = llm.generate(PROMPTS[0], GREEDY)
    [ids] = llm.generate({"prompt_token_ids": text.prompt_token_ids}, GREEDY)
    assert ids.outputs == text.outputs
    assert ids.prompt is None


def test_chat(llm, client):
    messages = [{"role": "user", "content": "def add(a, b):"}]
    [output] = llm.chat(messages, GREEDY)
    reply = client.chat.completions.create(
        model="firebox-tiny", messages=messages, temperature=0, max_tokens=24
    )
    assert output.outputs[0].text == reply.choices[0].message.content
    assert [o.outputs[0].text for o in llm.chat([messages, messages], GREEDY)] == [output.outputs[0].text] * 2


def test_n_seeds_and_params_for_each_prompt(llm):
    params = SamplingParams(n=3, seed=7, temperature=1.0, max_tokens=12)
    [three] = llm.generate(PROMPTS[0], params)
    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    single = [SamplingParams(seed=7 + number, temperature=1.0, max_tokens=12) for number in range(3)]
    alone = llm.generate([PROMPTS[0]] * 3, single)
    assert [output.outputs[0].token_ids for output in alone] == [answer.token_ids for answer in three.outputs]
    with pytest.raises(ConfigError, match="2 sampling_params for 3 prompts"):
        llm.generate(PROMPTS, [GREEDY, GREEDY])


def test_logprobs(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=1)
    [output] = llm.generate(PROMPTS[0], params)
    [answer] = output.outputs
    chosen = [entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert [logprob.rank for logprob in chosen] == [1] * 5
    assert answer.cumulative_logprob == pytest.approx(sum(logprob.logprob for logprob in chosen))
    assert "".join(logprob.decoded_token for logprob in chosen) == answer.text
    assert all(len(entry) == 2 for entry in answer.logprobs)
    assert output.prompt_logprobs[0] is None
    assert [
        token in entry
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    [only] = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=5, logprobs=0))
    assert [[c.rank for c in entry.values()] for entry in only.outputs[0].logprobs] == [[1]] * 5
    [bare] = llm.generate(PROMPTS[0], GREEDY)
    assert (bare.outputs[0].logprobs, bare.outputs[0].cumulative_logprob) == (None, None)


def test_stop(llm):
    [whole] = llm.generate(PROMPTS[0], GREEDY)
    text = whole.outputs[0].text
    stop = text[4:7]
    [stopped] = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop=stop))
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    token = whole.outputs[0].token_ids[6]
    [by_token] = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[token])
    )
    ids = whole.outputs[0].token_ids
    assert by_token.outputs[0].token_ids == ids[: ids.index(token) + 1]
    assert by_token.outputs[0].stop_reason == token
    assert by_token.outputs[0].text == llm.get_tokenizer().decode(ids[: ids.index(token)])


def test_a_repeated_prompt_is_cached(llm):
    prompt = "".join(f"name_{number} = {number}\n" for number in range(50))
    [first], [second] = llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY)
    assert first.num_cached_tokens < 64 < second.num_cached_tokens < len(second.prompt_token_ids)
    assert second.outputs == first.outputs


def test_without_params_the_checkpoints_own(llm):
    assert llm.get_default_sampling_params() == SamplingParams()
    assert 1 <= len(llm.generate(PROMPTS[0])[0].outputs[0].token_ids) <= 16


def test_ctrl_c_gives_up_what_was_asked(llm):
    threading.Timer(0.4, os.kill, [os.getpid(), signal.SIGINT]).start()
    endless = SamplingParams(max_tokens=4000, ignore_eos=True)
    before = llm._text.engine.stats.generated_tokens
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[0], endless)
    assert llm._text.engine.stats.generated_tokens - before < 4000, "given up, not waited for"
    wait_for(lambda: llm._text.engine.in_flight == 0, 5)


def test_works_inside_a_running_loop(llm):
    async def notebook_cell() -> str:
        return llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].text

    assert asyncio.run(notebook_cell()) == llm.generate(PROMPTS[1], GREEDY)[0].outputs[0].text


def test_wrong_values_are_our_errors_and_leave_nothing_running(llm):
    with pytest.raises(RequestError, match="temperature"):
        llm.generate(PROMPTS, SamplingParams(temperature=3))
    with pytest.raises(ContextTooLong):
        llm.generate([PROMPTS[0], {"prompt_token_ids": [5] * 5000}], GREEDY)
    with pytest.raises(RequestError, match="n is 0"):
        llm.generate(PROMPTS, SamplingParams(n=0))
    assert llm._text.engine.in_flight == 0
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].text


def test_wrong_settings():
    with pytest.raises(ConfigError, match="no setting 'max_model_len'") as caught:
        LLM(max_model_len=10)
    assert "context_length" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="no model"):
        LLM("no-such-model")


def test_start_up_errors_of_the_engine_arrive():
    with pytest.raises(ConfigError, match="context_length is 10000000"):
        LLM(context_length=10_000_000)


def test_closed():
    llm = LLM()
    llm.close()
    llm.close()
    with pytest.raises(EngineDied, match="closed"):
        llm.generate("a")


def test_a_script_that_forgets_to_close_ends_by_itself():
    code = (
        "from firebox import LLM, SamplingParams\n"
        "llm = LLM()\n"
        "print(llm.generate('a', SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count(",") == 1
    assert done.stderr == ""
    assert firebox.__version__
