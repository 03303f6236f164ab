"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from firebox.answer import Answer, Piece, aborting
from firebox.errors import RequestError
from firebox.server import logprobs, problems
from firebox.server.replies import POST_ERRORS, ChatChoice, ChatCompletion, ChatMessageReply
from firebox.server.service import (
    ReplyHead,
    blames,
    complete,
    count_usage,
    reply_head,
    service_of,
    unless_gone,
)
from firebox.server.sse import EventStream, to_json
from firebox.server.wire import ChatRequest, message_dicts
from firebox.text.tokenizer import Tokenizer

router = APIRouter()
OK = {"model": ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.post("/v1/chat/completions", response_model=None, responses={200: OK, **POST_ERRORS})
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answers a chat through the checkpoint's chat template."""
    service = service_of(request)
    service.require_model(body.model)
    try:
        prompt_ids = await service.text.chat_ids(message_dicts(body.messages))
        answers = service.text.submit(
            [prompt_ids], body.params(service.text.defaults), priority=body.priority
        )
    except RequestError as error:
        raise blames("messages", error) from error
    head = reply_head("chatcmpl", service)
    tokenizer = service.text.tokenizer if body.logprobs else None
    if body.stream:
        usage = (lambda: count_usage([prompt_ids], answers)) if body.include_usage else None
        chunks = ChatChunks(tokenizer, prompt_ids if body.return_token_ids else None)
        return EventStream(service, head, "chat.completion.chunk", answers, chunks, usage)
    with aborting(answers):
        if not await unless_gone(request.receive, complete(service, answers)):
            return Response(status_code=problems.CLIENT_GONE)
    shown_ids = prompt_ids if body.return_token_ids else None
    return problems.response(200, _reply(head, [prompt_ids], answers, tokenizer, shown_ids))


class ChatChunks:
    """The choices of a chat stream. `tokenizer`: given when logprobs are asked for; `prompt_ids`: when token
    ids are."""

    def __init__(self, tokenizer: Tokenizer | None, prompt_ids: list[int] | None) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._opened: set[int] = set()

    def choice(self, index: int, answer: Answer, piece: Piece) -> bytes | None:
        """The piece as a delta; the first one also says who speaks."""
        wants_logprobs = self._tokenizer is not None and piece.logprobs
        wants_ids = self._prompt_ids is not None and piece.ids
        if not (piece.text or piece.finish_reason or wants_logprobs or wants_ids):
            return None
        role = b""
        if index not in self._opened:
            self._opened.add(index)
            role = b'"role":"assistant",'
        entries = b"null"
        if self._tokenizer is not None:
            entries = logprobs.chat(self._tokenizer, piece.logprobs).model_dump_json().encode()
        return b'{"index":%d,"delta":{%b"content":%b},"logprobs":%b,"finish_reason":%b%b}' % (
            index,
            role,
            to_json(piece.text),
            entries,
            to_json(piece.finish_reason),
            b"" if self._prompt_ids is None else b',"token_ids":' + to_json(piece.ids),
        )

    def opening(self) -> bytes:
        """The prompt's ids, in the first event alone."""
        return b"" if self._prompt_ids is None else b'"prompt_token_ids":' + to_json(self._prompt_ids) + b","


def _reply(
    head: ReplyHead,
    prompts: list[list[int]],
    answers: list[Answer],
    tokenizer: Tokenizer | None,
    shown_ids: list[int] | None,
) -> bytes:
    choices = [
        ChatChoice.model_validate(
            {
                "index": index,
                "message": ChatMessageReply(content=answer.text),
                "logprobs": None if tokenizer is None else logprobs.chat(tokenizer, answer.logprobs),
                "finish_reason": answer.finish_reason,
                "token_ids": None if shown_ids is None else answer.ids,
            }
        )
        for index, answer in enumerate(answers)
    ]
    reply = ChatCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=choices,
        usage=count_usage(prompts, answers),
        prompt_token_ids=shown_ids,
    )
    return reply.model_dump_json().encode()
