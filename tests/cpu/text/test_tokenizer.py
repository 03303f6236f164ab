from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from firebox.errors import CheckpointError, RequestError
from firebox.text.folder import resolve_folder
from firebox.text.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=TEXT)
def test_any_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(data=st.data())
def test_decode_equals_the_library_on_any_ids(tokenizer, data):
    """Also where the bytes are not UTF-8: both write one U+FFFD for each maximal broken part."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    for skip in (True, False):
        expected = tokenizer.fast.backend_tokenizer.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(cut=st.integers(0, 20), text=st.text(st.sampled_from("🔥日é😀ñ"), max_size=6))
def test_decode_equals_the_library_on_cut_characters(tokenizer, cut, text):
    ids = tokenizer.encode(text)[cut:]
    assert tokenizer.decode(ids) == tokenizer.fast.backend_tokenizer.decode(ids)


@given(text=st.text(st.sampled_from("ab end é日")))
def test_sentencepiece_equals_the_library(sentencepiece, text):
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids, first=True) == sentencepiece.fast.backend_tokenizer.decode(ids) == text


def test_sentencepiece_keeps_the_space_of_a_continuation(sentencepiece):
    ids = sentencepiece.encode("a")
    assert sentencepiece.decode(ids) == " a"
    assert sentencepiece.decode(ids, first=True) == "a"
    assert sentencepiece.token_bytes(sentencepiece.encode("日")[-1]) == "日".encode()[-1:]


def test_special_tokens(tokenizer):
    ids = tokenizer.encode("<|user|>hi<|endoftext|>")
    assert ids[0] in tokenizer.special_ids
    assert ids[-1] in tokenizer.special_ids
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi<|endoftext|>"


def test_id_without_a_token_is_no_text(tokenizer):
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""
    assert tokenizer.token_string(tokenizer.vocab_size + 5) == ""


def test_vocabulary_has_every_byte_and_nothing_empty(tokenizer):
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(vocabulary)
    assert b"" not in vocabulary


def test_lone_surrogate_is_the_requests_fault(tokenizer):
    with pytest.raises(RequestError, match="surrogate") as caught:
        tokenizer.encode("\ud800")
    assert caught.value.param == "prompt"


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.CTC(), None])
def test_tokens_that_are_not_bytes_are_refused(decoder):
    backend = Backend(models.BPE({"a": 0}, []))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(CheckpointError, match="neither byte-level BPE nor SentencePiece"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_truncation_and_padding_of_the_file_are_switched_off(tokenizer, tmp_path):
    """Some checkpoints' tokenizer.json cuts every text at 512 tokens."""
    for file in resolve_folder("firebox-tiny").glob("*token*"):
        shutil.copy(file, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = "one two three four five six seven"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


def test_no_torch_is_imported():
    code = (
        "import sys; from firebox.text.tokenizer import Tokenizer;"
        "from firebox.text.templates import chat_ids;"
        "from firebox.text.folder import resolve_folder;"
        "t = Tokenizer.load(resolve_folder('firebox-tiny'));"
        "assert chat_ids(t, [{'role': 'user', 'content': 'hi'}]);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
