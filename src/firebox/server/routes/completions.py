"""POST /v1/completions, with `echo` and `logprobs` as evaluation harnesses use them."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from firebox.answer import Answer, Piece, SamplingParams, aborting
from firebox.server import problems
from firebox.server.logprobs import CompletionLogprobsWriter
from firebox.server.replies import POST_ERRORS, Completion, CompletionChoice, CompletionLogprobs
from firebox.server.service import complete, count_usage, reply_head, service_of, unless_gone
from firebox.server.sse import EventStream, to_json
from firebox.server.wire import CompletionRequest
from firebox.text.tokenizer import Tokenizer

router = APIRouter()
OK = {"model": Completion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids, and as the text that `echo` repeats."""

    ids: list[int]
    text: str


@router.post("/v1/completions", response_model=None, responses={200: OK, **POST_ERRORS})
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continues each prompt `n` times."""
    service = service_of(request)
    service.require_model(body.model)
    params = body.params(service.text.defaults)
    tokenizer = service.text.tokenizer
    prompts = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            prompts.append(Prompt(await service.text.prompt_ids(prompt), prompt))
        else:
            text = (
                tokenizer.decode(prompt, skip_special_tokens=params.skip_special_tokens, first=True)
                if body.echo
                else ""
            )
            prompts.append(Prompt(prompt, text))
    ids = [prompt.ids for prompt in prompts]
    answers = service.text.submit(ids, params, priority=body.priority)
    writers = [
        ChoiceWriter(
            tokenizer,
            params,
            prompts[i // params.n] if body.echo else None,
            prompts[i // params.n].ids if body.return_token_ids else None,
        )
        for i in range(len(answers))
    ]
    head = reply_head("cmpl", service)
    if body.stream:
        usage = (lambda: count_usage(ids, answers)) if body.include_usage else None
        return EventStream(service, head, "text_completion", answers, CompletionChunks(writers), usage)
    with aborting(answers):
        if not await unless_gone(request.receive, complete(service, answers)):
            return Response(status_code=problems.CLIENT_GONE)
    reply = Completion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[
            writer.whole(index, answer)
            for index, (writer, answer) in enumerate(zip(writers, answers, strict=True))
        ],
        usage=count_usage(ids, answers),
    )
    return problems.response(200, reply.model_dump_json().encode())


class ChoiceWriter:
    """One answer's text and logprobs, whole or piece by piece. `echo`: the prompt that comes before it.
    `prompt_ids`: given when token ids are asked for."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        echo: Prompt | None,
        prompt_ids: list[int] | None,
    ) -> None:
        self._echo = echo
        self._prompt_ids = prompt_ids
        self.shows_ids = prompt_ids is not None
        self._logprobs = None
        if params.logprobs is not None:
            skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
            self._logprobs = CompletionLogprobsWriter(tokenizer, skipped=skipped, echo=echo is not None)

    def whole(self, index: int, answer: Answer) -> CompletionChoice:
        """The choice of a reply that is not streamed."""
        assert answer.finish_reason is not None
        text, logprobs = self.part(
            answer, Piece(answer.text, answer.ids, answer.logprobs, answer.finish_reason)
        )
        return CompletionChoice.model_validate(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": answer.finish_reason,
                "token_ids": answer.ids if self.shows_ids else None,
                "prompt_token_ids": self._prompt_ids,
            }
        )

    def ids(self, piece: Piece) -> bytes:
        """The ids of a piece as JSON fields, those of the prompt with the first one."""
        if not self.shows_ids:
            return b""
        prompt_ids, self._prompt_ids = self._prompt_ids, None
        prompt = b"" if prompt_ids is None else b',"prompt_token_ids":' + to_json(prompt_ids)
        return b',"token_ids":' + to_json(piece.ids) + prompt

    def part(self, answer: Answer, piece: Piece) -> tuple[str, CompletionLogprobs | None]:
        """The next piece; the first one brings the echo."""
        echo, self._echo = self._echo, None
        text = piece.text if echo is None else echo.text + piece.text
        if self._logprobs is None:
            return text, None
        if echo is None:
            return text, self._logprobs.write(piece.ids, piece.logprobs)
        assert answer.prompt_logprobs is not None
        return text, self._logprobs.write([*echo.ids, *piece.ids], [*answer.prompt_logprobs, *piece.logprobs])


class CompletionChunks:
    """The choices of a completion stream."""

    def __init__(self, writers: list[ChoiceWriter]) -> None:
        self._writers = writers

    def choice(self, index: int, answer: Answer, piece: Piece) -> bytes | None:
        """The piece as a choice."""
        writer = self._writers[index]
        text, logprobs = writer.part(answer, piece)
        if not (text or piece.finish_reason or logprobs or (writer.shows_ids and piece.ids)):
            return None
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}' % (
            index,
            to_json(text),
            b"null" if logprobs is None else logprobs.model_dump_json().encode(),
            to_json(piece.finish_reason),
            writer.ids(piece),
        )

    def opening(self) -> bytes:
        """Nothing: each choice has its own prompt."""
        return b""
