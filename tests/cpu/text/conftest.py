from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from firebox.text.folder import resolve_folder
from firebox.text.tokenizer import Tokenizer as OurTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> OurTokenizer:
    """The bundled byte-level BPE."""
    return OurTokenizer.load(resolve_folder("firebox-tiny"))


@pytest.fixture(scope="session")
def sentencepiece() -> OurTokenizer:
    """SentencePiece BPE with byte fallback, as Llama 2's: a space before every text, <0x..> for bytes."""
    pieces = ["▁", "a", "b", "e", "n", "d", "▁a", "en", "end", "é"]
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("e", "n"), ("en", "d")]
    vocabulary = {word: id for id, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return OurTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
