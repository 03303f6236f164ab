"""The tokenizer: byte-level BPE over pieces cut for Python source; any text survives a round trip unchanged.

The cut lets a merge hold a word with one sign before it (`.append`, `_name`, ` self`), up to three digits, a
run of signs (` ==`, `):`), or line ends together with the indent that follows, and nothing that crosses
those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.train_tiny.spec import END, END_ID, SPECIAL_TOKENS

PIECES = "|".join(
    (
        r"(?:\r?\n[ \t]*)+",  # line ends and the next line's indent
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with one sign or space before it
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # a run of signs
        r"\s+",
    )
)


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A tokenizer of exactly `vocab` ids; ids 0.. are SPECIAL_TOKENS, then the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=48,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == vocab, (tokenizer.get_vocab_size(), vocab)
    assert tokenizer.token_to_id(END) == END_ID
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path, max_context_tokens: int) -> None:
    """tokenizer.json and the two files transformers reads beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": END, "pad_token": END}
    roles = {"additional_special_tokens": list(SPECIAL_TOKENS[1:])}
    _write_json(folder / "special_tokens_map.json", {**names, **roles})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "bos_token": None,
            "unk_token": None,
            **roles,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_context_tokens,
            "padding_side": "left",
        },
    )


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
