"""POST /tokenize and /detokenize, in vLLM's shape."""

from __future__ import annotations

from fastapi import APIRouter, Request

from firebox.errors import RequestError
from firebox.server.replies import POST_ERRORS, Detokenized, Tokenized
from firebox.server.service import service_of
from firebox.server.wire import DetokenizeRequest, TokenizeRequest, message_dicts

router = APIRouter()


@router.post("/tokenize", responses=POST_ERRORS)
async def tokenize(body: TokenizeRequest, request: Request) -> Tokenized:
    """The ids that a completion of this prompt, or a chat with these messages, would begin with."""
    service = service_of(request)
    service.require_model(body.model)
    if body.messages is not None:
        ids = await service.text.chat_ids(
            message_dicts(body.messages), add_generation_prompt=body.add_generation_prompt is not False
        )
    else:
        ids = await service.text.prompt_ids(
            body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    tokenizer = service.text.tokenizer
    return Tokenized(
        count=len(ids),
        max_model_len=service.text.engine.ready.context_tokens,
        tokens=ids,
        token_strs=[tokenizer.token_string(id) for id in ids] if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=POST_ERRORS)
async def detokenize(body: DetokenizeRequest, request: Request) -> Detokenized:
    """The text of these ids, special tokens included."""
    service = service_of(request)
    service.require_model(body.model)
    tokenizer = service.text.tokenizer
    for token_id in body.tokens:
        if token_id >= tokenizer.vocab_size:
            raise RequestError(
                f"tokens has {token_id}; the vocabulary ends at {tokenizer.vocab_size}", param="tokens"
            )
    return Detokenized(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False, first=True))
