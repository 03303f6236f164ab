from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from firebox.errors import RequestError, UnsupportedField
from firebox.text.templates import chat_ids, render
from firebox.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.fast.backend_tokenizer)
    fast.chat_template = template
    return Tokenizer(fast)


def test_bundled_template(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        *HI,
        {"role": "assistant", "content": "hello"},
        *HI,
    ]
    expected = "<|system|>\nbe brief<|user|>\nhi<|assistant|>\nhello<|endoftext|><|user|>\nhi<|assistant|>\n"
    assert render(tokenizer, messages) == expected
    assert tokenizer.decode(chat_ids(tokenizer, messages), skip_special_tokens=False) == expected
    assert render(tokenizer, messages, add_generation_prompt=False) == expected.removesuffix(
        "<|assistant|>\n"
    )


def test_markers_in_the_template_become_special_tokens(tokenizer):
    ids = chat_ids(tokenizer, HI)
    assert [tokenizer.token_string(id) for id in ids if id in tokenizer.special_ids] == [
        "<|user|>",
        "<|assistant|>",
    ]


def test_no_second_bos(tokenizer):
    """The template writes it; the tokenizer must not add it again."""
    backend = Backend.from_str(tokenizer.fast.backend_tokenizer.to_str())
    bos = ("<|system|>", tokenizer.encode("<|system|>")[0])
    backend.post_processor = TemplateProcessing(single="<|system|> $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = "<|system|>{{ messages[0].content }}"
    adding = Tokenizer(fast)
    assert adding.encode("hi") == tokenizer.encode("<|system|>hi"), "the test needs a tokenizer that adds one"
    assert chat_ids(adding, HI) == tokenizer.encode("<|system|>hi")


def test_text_parts_are_joined_for_templates_that_expect_a_string(tokenizer):
    strict = with_template(tokenizer, "{{ messages[0]['content'] + '!' }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render(strict, [{"role": "user", "content": parts}]) == "a\nb!"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('not these') }}", "{{ messages[0].content.nothing.at_all }}", "{{ 1 + 'a' }}"],
)
def test_a_template_that_fails_blames_the_messages(tokenizer, template):
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        render(with_template(tokenizer, template), HI)
    assert caught.value.param == "messages"


def test_templates_cannot_reach_python(tokenizer):
    """A checkpoint's template is somebody else's code; it runs in Jinja's sandbox."""
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RequestError):
        render(with_template(tokenizer, attack), HI)


def test_no_template(tokenizer):
    with pytest.raises(UnsupportedField, match="no chat template"):
        render(with_template(tokenizer, None), HI)
