"""The tokenizer of a checkpoint, as text to ids and ids to bytes.

Every token stands for a fixed run of bytes, so a sequence of ids is the concatenation of those runs, read as
UTF-8 with U+FFFD for what is not. This holds for the two families that language models use, byte-level BPE
and SentencePiece (with or without byte fallback), makes decoding exact at every split, and costs one table
look-up a token. The text equals what the `tokenizers` library decodes wherever the bytes are UTF-8.
`clean_up_tokenization_spaces` is not applied: it rewrites text across token borders and so cannot be
streamed.

The file is read by transformers' `PreTrainedTokenizerFast`, which needs no torch and runs no code of the
checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from firebox.errors import CheckpointError, RequestError


class Tokenizer:
    """Text to ids and back. `special_ids`: tokens that `skip_special_tokens` drops. `vocab_size`: ids that
    have a token.

    `strips_first_space`: the tokenizer puts a space before every text, which is not part of it
    (SentencePiece).
    """

    def __init__(self, fast: PreTrainedTokenizerFast, source: str = "tokenizer.json") -> None:
        self.fast = fast
        self._backend: Any = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self._added: dict[int, bytes] = {id: token.content.encode() for id, token in added.items()}
        self._bytes_of, self.strips_first_space = _byte_reader(self._backend.decoder, source)
        self._table: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads `folder/tokenizer.json`. Raises CheckpointError when it is missing or cannot be read."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json",
                hint="the folder needs a fast tokenizer; transformers can convert a slow one",
            )
        try:
            fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls(fast, str(file))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens` adds what the checkpoint puts around a text, such as a first
        BOS token.
        """
        try:
            # A batch of one: unlike encode, encode_batch lets other Python threads run meanwhile.
            [encoding] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(
                "the prompt holds a lone surrogate, which is not a character", param="prompt"
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; empty for an id without a token (padding rows of the embedding)."""
        found = self._table.get(token_id)
        if found is None:
            found = self._table[token_id] = self._look_up(token_id)
        return found

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, first: bool = False) -> str:
        """Text of `ids`. `first`: they begin a text, so the space that SentencePiece puts before it is not
        part of it.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(id) for id in ids if id not in skipped)
        if first and self.strips_first_space and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_string(self, token_id: int) -> str:
        """The token as its vocabulary spells it ("Ġthe"), or "" for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def vocabulary(self) -> Sequence[bytes]:
        """The bytes of every token, by id."""
        return [self.token_bytes(id) for id in range(self.vocab_size)]

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._bytes_of(token)


def _byte_reader(decoder: Any, source: str) -> tuple[Any, bool]:
    """How the decoder of tokenizer.json reads one token, and whether it drops a text's first space."""
    steps = _steps(decoder)
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return _byte_level, False
    if kinds and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        strips = any(step["type"] == "Strip" and step.get("start") for step in steps) or any(
            step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
        )
        return (_sentencepiece_bytes if "ByteFallback" in kinds else _sentencepiece), strips
    raise CheckpointError(
        f"{source}: the decoder {sorted(kinds) or 'is missing'} is neither byte-level BPE nor SentencePiece",
        hint="Firebox serves checkpoints whose tokens stand for fixed bytes",
    )


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # not written in the alphabet: the token is plain text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return _sentencepiece(token)
