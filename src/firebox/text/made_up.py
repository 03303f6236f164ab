"""A tokenizer for a model folder that has none, so that a card can be served with made-up weights: text goes
in as its bytes, and an id beyond those reads "<id>". Nothing but `--load-format dummy` uses it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from firebox.text.tokenizer import Tokenizer


def made_up(vocab_size: int) -> Tokenizer:
    """Ids 0 … 255 are bytes in the order of the byte-level alphabet, the others spell their number; at least
    256 of them."""
    vocab = {character: id for id, character in enumerate(byte_alphabet())}
    vocab |= {f"<{id}>": id for id in range(len(vocab), vocab_size)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return Tokenizer.load(Path(folder))


def byte_alphabet() -> list[str]:
    """One printable character for each byte, as byte-level BPE spells them: itself where it is printable,
    else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [spelled[byte] for byte in range(256)]
