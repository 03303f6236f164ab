"""An OpenAI-compatible server whose speed is known exactly: it computes nothing, and sends each piece when
its schedule says so. It keeps what it sent, so that a test can hold a measurement against the truth.

A request is one stream. Its first token is due `first_token_s` after the request was read, token k after that
at `token_s` each; a `Behaviour` changes how tokens are put into pieces and what goes wrong. Raw HTTP/1.1 over
asyncio's streams: a web framework's own time would blur the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from firebox.bench.prompts import corpus

WORDS = [f"{word} " for word in sorted(set(re.findall(r"[a-z]{3,12}", corpus())))]  # a token each
WORD_IDS: dict[str, int] = {}  # the vocabulary, made as words come


@dataclass(frozen=True)
class Behaviour:
    """`burst`: tokens of one step, sent as one piece, every `burst` × token_s (speculative decoding).
    `tokens_a_piece`: a server that gathers tokens before it sends them. `stall_after`, `stall_s`: a pause
    once that many tokens are out. `abort_after`: the connection is cut there. `reasoning`: of the tokens, how
    many come first as reasoning_content. `usage`: whether the last event tells it. `ids`: token_ids in every
    piece. `text`: what each token says, over and over; None: varied words. `slots`: streams at once, others
    wait. `status`: answers that HTTP status instead. `refuses`: fields that it answers with 400. `claims`: of
    the truth, what its usage says; `metered`: what its counter says. `tokenizes`: it has /tokenize.
    `logprob`: of every token; its counters of drafts are those of `burst`.
    `idle_s`: after how long without a request it closes a connection.
    """

    first_token_s: float = 0.1
    token_s: float = 0.01
    burst: int = 1
    tokens_a_piece: int = 1
    stall_after: int = 0
    stall_s: float = 0.0
    abort_after: int = 0
    reasoning: int = 0
    usage: bool = True
    ids: bool = False
    text: str | None = None
    slots: int = 1 << 20
    status: int = 200
    refuses: tuple[str, ...] = ()
    stops_after: int = 0
    accepted: bool = False
    cuts_bytes: bool = False
    claims: float = 1.0
    metered: float = 1.0
    tokenizes: bool = False
    logprob: float | None = None
    idle_s: float | None = None


@dataclass
class Truth:
    """What was sent: per request its number of tokens, when it was read, and when each token left."""

    requests: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


class _Simulation:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.truth = behaviour, Truth()
        self.slots = asyncio.Semaphore(behaviour.slots)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            while head := await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.behaviour.idle_s):
                length = content_length(head)
                body = await reader.readexactly(length)
                if not await self.answer(head.split(b" ", 2)[1].decode(), body, writer):
                    break
        writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/models":
            return _whole(writer, {"object": "list", "data": [{"id": "simulated", "max_model_len": 1 << 20}]})
        if path == "/truth":
            return _whole(writer, vars(self.truth))
        if path == "/metrics":
            return _whole(writer, self.metrics())
        if path == "/tokenize" and self.behaviour.tokenizes:
            asked = json.loads(body)
            ids = [WORD_IDS.setdefault(word, len(WORD_IDS)) for word in asked["prompt"].split()]
            return _whole(writer, {"tokens": ids, "count": len(ids)})
        if path == "/detokenize" and self.behaviour.tokenizes:
            known = {id: word for word, id in WORD_IDS.items()}
            return _whole(writer, {"prompt": " ".join(known[id] for id in json.loads(body)["tokens"])})
        if not path.endswith("/completions"):
            return _whole(writer, {"error": {"message": "no such route"}}, 404)
        asked = json.loads(body)
        for name in self.behaviour.refuses:
            if name in asked:
                return _whole(writer, {"error": {"message": f"unknown field {name}", "param": name}}, 400)
        if self.behaviour.status != 200:
            return _whole(writer, {"error": {"message": "as told"}}, self.behaviour.status)
        if not asked.get("stream"):
            said = {"message": {"role": "assistant", "content": "Yes."}, "text": "Yes."}
            prompt = asked.get("prompt") or json.dumps(asked.get("messages"))
            usage = self.usage(prompt, 1)
            return _whole(
                writer, {"choices": [{"index": 0, "finish_reason": "stop", **said}], "usage": usage}
            )
        return await self.stream(asked, path.startswith("/v1/chat"), writer)

    def metrics(self) -> str:
        tokens = self.behaviour.metered * sum(len(request["sent"]) for request in self.truth.requests)
        return (
            f"# TYPE vllm:generation_tokens counter\nvllm:generation_tokens_total {tokens}\n"
            + self.draft_metrics()
        )

    def draft_metrics(self) -> str:
        if self.behaviour.burst == 1:
            return ""
        steps = sum(-(-len(request["sent"]) // self.behaviour.burst) for request in self.truth.requests)
        names = {"drafts": steps, "accepted_tokens": steps * (self.behaviour.burst - 1)}
        return "".join(
            f"# TYPE vllm:spec_decode_num_{name} counter\nvllm:spec_decode_num_{name}_total {value}\n"
            for name, value in names.items()
        )

    async def stream(self, asked: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> bool:
        how, loop = self.behaviour, asyncio.get_running_loop()
        prompt = asked.get("prompt") or json.dumps(asked.get("messages"))
        count = asked["max_tokens"] if not how.stops_after else min(how.stops_after, asked["max_tokens"])
        mine: dict[str, Any] = {"read": time.perf_counter(), "sent": [], "wanted": count}
        self.truth.requests.append(mine)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        async with self.slots:
            self.truth.running += 1
            self.truth.most_running = max(self.truth.most_running, self.truth.running)
            begin = loop.time()
            if chat:
                _send(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            size = max(how.burst, how.tokens_a_piece)
            for first in range(0, count, size):
                last = min(first + size, count)
                # gathered tokens leave with the last of them, those of one step together with the first
                due = (
                    begin + how.first_token_s + how.token_s * (last - 1 if how.tokens_a_piece > 1 else first)
                )
                if how.stall_after and last > how.stall_after:
                    due += how.stall_s
                await asyncio.sleep(due - loop.time())
                if how.abort_after and last > how.abort_after:
                    self.truth.running -= 1
                    writer.transport.abort()
                    return False
                self.piece(writer, chat, range(first, last), mine)
            self.truth.running -= 1
        finish = "length" if count == asked["max_tokens"] else "stop"
        said = {"delta": {}} if chat else {"text": ""}
        _send(writer, {"choices": [{"index": 0, **said, "finish_reason": finish}]})
        if how.usage and asked.get("stream_options", {}).get("include_usage"):
            _send(writer, {"choices": [], "usage": self.usage(prompt, count)})
        payload = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(payload), payload))
        await writer.drain()
        return True

    def usage(self, prompt: Any, count: int) -> dict[str, Any]:
        words = len(prompt.split() if isinstance(prompt, str) else prompt)
        usage: dict[str, Any] = {
            "prompt_tokens": words,
            "completion_tokens": round(count * self.behaviour.claims),
        }
        if self.behaviour.accepted:
            drafts = count * (self.behaviour.burst - 1) // self.behaviour.burst
            usage["completion_tokens_details"] = {"accepted_prediction_tokens": drafts}
        return usage

    def piece(self, writer: asyncio.StreamWriter, chat: bool, tokens: range, mine: dict[str, Any]) -> None:
        how = self.behaviour
        draw = random.Random(f"{mine['read']} {tokens[0]}")
        said = [how.text if how.text is not None else draw.choice(WORDS) for _ in tokens]
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        if chat:
            reasoning = tokens[0] < how.reasoning
            choice["delta"] = {"reasoning_content" if reasoning else "content": "".join(said)}
        else:
            choice["text"] = "".join(said)
        if how.logprob is not None and not chat:
            choice["logprobs"] = {"token_logprobs": [how.logprob] * len(tokens)}
        if how.ids:
            choice["token_ids"] = list(tokens)
        _send(
            writer,
            {"id": "x", "object": "chunk", "created": 1, "model": "simulated", "choices": [choice]},
            how.cuts_bytes,
        )
        now = time.perf_counter()
        mine["sent"] += [now] * len(tokens)


def content_length(head: bytes) -> int:
    fields = (line.partition(b":") for line in head.split(b"\r\n"))
    return next((int(value) for name, _, value in fields if name.lower() == b"content-length"), 0)


def _send(writer: asyncio.StreamWriter, event: dict[str, Any], cut: bool = False) -> None:
    payload = f"data: {json.dumps(event)}\n\n".encode()
    for part in [payload] if not cut else [payload[:7], payload[7:]]:
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))


def _whole(writer: asyncio.StreamWriter, document: Any, status: int = 200) -> bool:
    body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
    kind = "text/plain" if isinstance(document, str) else "application/json"
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    return True


def _run(behaviour: Behaviour, ready: Any) -> None:
    async def main() -> None:
        simulation = _Simulation(behaviour)
        server = await asyncio.start_server(simulation.connection, "127.0.0.1", 0, backlog=2048)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def simulated(behaviour: Behaviour) -> Iterator[str]:
    """The server in a process of its own, so that its work is not the client's; its URL."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(behaviour, send), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receive.recv()}"
    finally:
        process.kill()
        process.join()
