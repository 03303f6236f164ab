"""Stage `prepare`: corpus → tokenizer → token ids, all in `build/train_tiny/`; the others read only that.

tokens.npz holds `file_ids`, `chat_ids`, `held_out_ids` (each all documents joined, uint16) with `*_lengths`
(tokens a document, int32), `held_out_bytes` (the held-out files joined, uint8) with `held_out_byte_lengths`,
and `line_starts` [vocab] bool: the ids that begin with a line end. A file is the document `<|endoftext|> text
<|endoftext|>`, a conversation starts with its role token; so every document carries its own start and end.
corpus.json describes the split in numbers and lists the held-out paths.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tools.train_tiny import corpus, tokenizer
from tools.train_tiny.corpus import Document
from tools.train_tiny.spec import END_ID, WORK, Sizes

ROUND_TRIPS = (
    "naïve 😀 \u200b\x00\x7f",
    "\tif x:\r\n\r\n    y = 1_000  \n",
    "日本語\n\n\n        pass\n   \n",
    "  lead",
    "",
)


def prepare(sizes: Sizes) -> None:
    """Writes tokens.npz, corpus.json and the tokenizer's files into the work folder."""
    WORK.mkdir(parents=True, exist_ok=True)
    training, held_out = corpus.split(corpus.read_library())
    trained = tokenizer.train((document.text for document in training), sizes.vocab)
    tokenizer.write(trained, WORK, sizes.max_context_tokens)
    check_round_trips(trained, held_out)

    arrays: dict[str, np.ndarray] = {}
    for name, documents in (("file", training), ("held_out", held_out)):
        encodings = trained.encode_batch([document.text for document in documents])
        _add(arrays, name, [[END_ID, *encoding.ids, END_ID] for encoding in encodings])
    conversations = corpus.chat_texts(training)
    _add(arrays, "chat", [encoding.ids for encoding in trained.encode_batch(conversations)])
    pieces = trained.decode_batch([[token] for token in range(sizes.vocab)], skip_special_tokens=False)
    arrays["line_starts"] = np.array([piece.startswith(("\n", "\r")) for piece in pieces])
    raw = [document.text.encode() for document in held_out]
    arrays["held_out_bytes"] = np.frombuffer(b"".join(raw), np.uint8)
    arrays["held_out_byte_lengths"] = np.array([len(text) for text in raw], np.int32)
    np.savez_compressed(WORK / "tokens.npz", **arrays)

    description = describe(training, held_out, arrays)
    (WORK / "corpus.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("chat_template.jinja"), WORK)
    print(json.dumps({key: value for key, value in description.items() if key != "held_out_paths"}, indent=1))


def check_round_trips(trained: Tokenizer, documents: list[Document]) -> None:
    """Asserts that decode(encode(text)) is text, for the held-out files and some hard strings."""
    for text in (*ROUND_TRIPS, *(document.text for document in documents)):
        ids = trained.encode(text).ids
        assert trained.decode(ids, skip_special_tokens=False) == text, text[:80]


def describe(training: list[Document], held_out: list[Document], arrays: dict[str, np.ndarray]) -> dict:
    """The corpus in numbers, for the model card."""
    training_bytes = sum(len(document.text.encode()) for document in training)
    return {
        "python": platform.python_version(),
        "training_files": len(training),
        "training_bytes": training_bytes,
        "training_tokens": int(arrays["file_lengths"].sum()),
        "conversations": len(arrays["chat_lengths"]),
        "conversation_tokens": int(arrays["chat_lengths"].sum()),
        "held_out_files": len(held_out),
        "held_out_bytes": len(arrays["held_out_bytes"]),
        "held_out_tokens": int(arrays["held_out_lengths"].sum()),
        "bytes_per_token": round(training_bytes / int(arrays["file_lengths"].sum()), 3),
        "held_out_paths": [document.path for document in held_out],
    }


def _add(arrays: dict[str, np.ndarray], name: str, documents: list[list[int]]) -> None:
    arrays[f"{name}_ids"] = np.concatenate([np.array(ids, np.uint16) for ids in documents])
    arrays[f"{name}_lengths"] = np.array([len(ids) for ids in documents], np.int32)
