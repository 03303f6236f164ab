"""The tokenizer of a folder that has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firebox.answer import load_text
from firebox.errors import CheckpointError
from firebox.text.folder import resolve_folder
from firebox.text.made_up import made_up


def test_text_is_bytes_and_other_ids_spell_themselves() -> None:
    tokenizer = made_up(300)
    text = "Grüße, <299>\n\t你好 \x00"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([256, 72, 105, 299]) == "<256>Hi<299>"
    assert tokenizer.vocab_size == 300


def test_a_card_gets_one_only_with_made_up_weights(tmp_path: Path) -> None:
    card = resolve_folder("kimi-k2.5-int4")
    tokenizer, _ = load_text(card, dummy=True)
    config = json.loads((card / "config.json").read_text())
    assert tokenizer.vocab_size == config.get("text_config", config)["vocab_size"]
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_text(card)


def test_a_folder_with_a_tokenizer_keeps_it() -> None:
    folder = resolve_folder("firebox-tiny")
    assert load_text(folder, dummy=True)[0].encode("Hello") == load_text(folder)[0].encode("Hello")
