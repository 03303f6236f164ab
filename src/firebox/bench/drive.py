"""Runs one phase: its sessions, as many at once as it has places, or each at its time.

A place takes the next session as soon as its last one ended, so a phase keeps its concurrency until no
session is left; the tail after that is part of the wall time, and `Run.steady_s` says where it begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import msgspec

from firebox.bench.base import Answer, Ask, Message, Phase, Session
from firebox.bench.client import Client
from firebox.bench.timer import now


class Run(msgspec.Struct, kw_only=True):
    """One run of a phase. `began_s` to `ended_s`: from the first request that was due to the last end.
    `steady_s`: when for the first time a place found no further session; `ended_s` with timed arrivals."""

    phase: Phase
    answers: list[Answer]
    began_s: float
    ended_s: float
    steady_s: float


async def drive(client: Client, phase: Phase, *, limit_s: float | None = None) -> Run:
    """Runs `phase`, after its warm sessions. Sessions that have not ended `limit_s` seconds after the start
    are cut off; their answers carry that as their error."""
    for session in phase.warm:
        await _Driver(client, watched=False).session(session, now())
    driver = _Driver(client)
    began_s = now()
    work = driver.arrivals(phase) if phase.sessions[0].starts_s is not None else driver.places(phase)
    try:
        await asyncio.wait_for(work, limit_s)
    except TimeoutError:
        driver.cut_off(f"not finished {limit_s:g} s after the phase began")
    ended_s = max((answer.ended_s for answer in driver.answers), default=now())
    steady_s = min(driver.idle_s or ended_s, ended_s)
    answers = sorted(driver.answers, key=lambda answer: answer.number)
    return Run(phase=phase, answers=answers, began_s=began_s, ended_s=ended_s, steady_s=steady_s)


class _Driver:
    def __init__(self, client: Client, *, watched: bool = True) -> None:
        self.client, self.watched = client, watched
        self.answers: list[Answer] = []
        self.open: dict[int, tuple[Ask, float]] = {}
        self.idle_s: float | None = None
        self._next = 0

    async def places(self, phase: Phase) -> None:
        waiting = iter(phase.sessions)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(phase.concurrency, len(phase.sessions))):
                group.create_task(self._place(waiting))

    async def _place(self, waiting: Iterator[Session]) -> None:
        for session in waiting:
            await self.session(session, now())
        if self.idle_s is None:
            self.idle_s = now()

    async def arrivals(self, phase: Phase) -> None:
        began_s, places = now(), asyncio.Semaphore(phase.concurrency)
        async with asyncio.TaskGroup() as group:
            for session in phase.sessions:
                assert session.starts_s is not None, "all sessions of a phase have a time, or none has"
                group.create_task(self._arrive(session, began_s + session.starts_s, places))

    async def _arrive(self, session: Session, due_s: float, places: asyncio.Semaphore) -> None:
        await asyncio.sleep(max(0.0, due_s - now()))
        async with places:
            await self.session(session, due_s)

    async def session(self, session: Session, due_s: float) -> None:
        """The asks of `session`, each with the answers to the earlier ones; ends at the first error."""
        said: tuple[Message, ...] = ()
        for turn, ask in enumerate(session.asks):
            if turn:
                await asyncio.sleep(session.pause_s)
                due_s = now()
            asked = msgspec.structs.replace(ask, messages=said + ask.messages) if ask.messages else ask
            answer = await self._ask(asked, due_s)
            if answer.error is not None:
                return
            said = (*asked.messages, Message("assistant", answer.content))

    async def _ask(self, ask: Ask, due_s: float) -> Answer:
        number, self._next = self._next, self._next + 1
        self.open[number] = (ask, due_s)
        answer = await self.client.ask(ask, number, due_s, watched=self.watched)
        del self.open[number]
        self.answers.append(answer)
        return answer

    def cut_off(self, why: str) -> None:
        at_s = now()
        for number, (ask, due_s) in self.open.items():
            self.answers.append(
                Answer(ask=ask, number=number, due_s=due_s, sent_s=due_s, ended_s=at_s, error=why)
            )
