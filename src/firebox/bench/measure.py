"""Measures a server: finds out what it is, runs every phase of a workload several times, watches the output,
holds the numbers against the laws, and makes rows.

Repetitions go round: every phase once, then every phase again in another order, so that a GPU that grows hot
or a machine that is busy for a minute does not meet one phase alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import msgspec

import firebox
from firebox.bench.base import Ask, Finding, Phase, Session
from firebox.bench.claim import Claim, Spread
from firebox.bench.client import Client, Target
from firebox.bench.drive import Run, drive
from firebox.bench.guards.base import Reference
from firebox.bench.laws import violations
from firebox.bench.prompts import CHARS_PER_TOKEN, Prompts, corpus
from firebox.bench.report.base import Report
from firebox.bench.roofline import Roofline
from firebox.bench.row import Row, Slo, condemn, mark_ties, summarise, withhold
from firebox.bench.server import TIMEOUT_S, Server, connect, counters, discover
from firebox.bench.timer import now
from firebox.bench.tokens import LocalVocabulary, ServerVocabulary, Vocabulary, count, told_ids
from firebox.bench.watch import Watch, judge
from firebox.bench.workloads.base import Options, workload
from firebox.hardware.probe import gpu_sensors

CALIBRATION_CHARS = 4000
REFERENCE, REFERENCE_TOKENS = "reference", 512
WARM_PROMPT, WARM_OUTPUT = 16, 8  # tokens
ONE_BY_ONE = 1.25  # tokens in the first event, on average, up to which they count as one


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. `choices`: fields of Options that were given. `limit_s`: of one run of a
    phase; `within_s`: of all, after which no run begins and the running one is cut off. `silence_s`: the
    longest wait for the next event of a stream."""

    url: str
    profile: str = "quick"
    choices: Mapping[str, Any] = {}
    model: str | None = None
    api_key: str | None = None
    chat: bool = False
    fields: Mapping[str, Any] = {}
    tokenizer: str | None = None
    random_ids: bool = False
    seed: int | None = None
    limit_s: float | None = None
    within_s: float | None = None
    silence_s: float = 300.0
    warm_up: bool = True
    slo: Slo | None = None
    references: Mapping[str, Reference] = {}
    roof: Roofline | None = None


OnRun = Callable[[str, int, int], None]
"""Called before each run with what it is, its number, and how many there are."""


def measure(
    settings: Settings, on_run: OnRun | None = None, go_on: Callable[[], bool] | None = None
) -> Report:
    """Runs the benchmark. `go_on` is asked before each run; once it says no, the rest is left out. Raises
    ConfigError for a server that is not there or options that cannot work, Silent for one that takes a
    request and does not answer it."""
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    seed = random.SystemRandom().randrange(2**32) if settings.seed is None else settings.seed
    with connect(settings.url, settings.api_key, min(TIMEOUT_S, settings.silence_s)) as http:
        server = discover(
            http,
            model=settings.model,
            chat=settings.chat,
            api_key=settings.api_key,
            fields=settings.fields,
            logprobs=bool(settings.references),
        )
        with asyncio.Runner() as loop, _client(loop, server.target, settings.silence_s) as client:
            session = _Session(settings, http, server, seed, loop, client)
            rows, runs = session.rows(on_run, go_on)
    return Report(
        url=server.target.url,
        model=server.target.model,
        profile=settings.profile,
        firebox=firebox.__version__,
        began=began,
        seed=seed,
        notes=session.notes,
        rows=rows,
        runs=runs,
        unfinished=session.unfinished,
    )


@contextlib.contextmanager
def _client(loop: asyncio.Runner, target: Target, silence_s: float) -> Iterator[Client]:
    """One client for all runs: its connections stay."""
    client = Client(target, silence_s=silence_s)
    loop.run(client.__aenter__())
    try:
        yield client
    finally:
        loop.run(client.__aexit__())


class _Session:
    """One benchmark of one server."""

    def __init__(
        self,
        settings: Settings,
        http: httpx.Client,
        server: Server,
        seed: int,
        loop: asyncio.Runner,
        client: Client,
    ) -> None:
        self.settings, self.http, self.server, self.seed = settings, http, server, seed
        self.loop, self.client = loop, client
        self.notes = list(server.notes)
        self.unfinished = False
        self.until = None if settings.within_s is None else now() + settings.within_s
        self.vocabulary = self._vocabulary()
        if not counters(http):
            self.notes.append("no /metrics: the server's own counts are not compared with ours")
        self.workload = workload(settings.profile)
        given = {**self.workload.DEFAULTS, **settings.choices}
        self.options = Options(**given, context_tokens=server.context_tokens)
        self.prompts = Prompts(
            self.vocabulary,
            seed=seed,
            chat=server.target.chat,
            random_ids=settings.random_ids,
            chars_per_token=CHARS_PER_TOKEN if self.vocabulary else self._chars_per_token(),
        )

    def rows(
        self, on_run: OnRun | None, go_on: Callable[[], bool] | None
    ) -> tuple[list[Row], list[list[Run]]]:
        by_phase: list[list[_Measured]] = []
        for repetition in range(self.options.repeat):
            self.prompts.seed(self.seed + repetition)
            phases = [*self.workload.phases(self.prompts, self.options), *self._reference_phase()]
            if not by_phase:
                by_phase = [[] for _ in phases]
                self._warm_up(phases)
            order = list(range(len(phases)))
            random.Random(self.seed + repetition).shuffle(order)
            for place, index in enumerate(order):
                if (go_on is not None and not go_on()) or self._left_s() == 0.0:
                    break
                if on_run is not None:
                    done = repetition * len(phases) + place
                    on_run(label(phases[index]), done + 1, self.options.repeat * len(phases))
                by_phase[index].append(self._run(phases[index]))
        if not by_phase:
            self.notes.append(f"no phase of {self.settings.profile} fits into the server's context")
        if any(len(measured) < self.options.repeat for measured in by_phase):
            self.unfinished = True
            self.notes.append("some runs were left out: no time, or nobody to answer")
        by_phase = [measured for measured in by_phase if measured]
        rows = [self._row(measured) for measured in by_phase]
        mark_ties(rows)
        return rows, [[each.run for each in measured] for measured in by_phase]

    def _warm_up(self, phases: list[Phase]) -> None:
        """As many short requests at once as each phase will send, so that no measured one waits for a kernel
        to be compiled or a graph to be captured. What they bring is not looked at."""
        if not self.settings.warm_up:
            return
        for concurrency in sorted({p.concurrency for p in phases if p.sessions[0].starts_s is None}):
            asks = [self.prompts.ask(WARM_PROMPT, WARM_OUTPUT) for _ in range(concurrency)]
            sessions = tuple(Session(asks=(ask,)) for ask in asks)
            phase = Phase(workload="warm-up", concurrency=concurrency, sessions=sessions)
            self._drive(phase, Watch())

    def _run(self, phase: Phase) -> _Measured:
        watch = Watch()
        before, sensed = counters(self.http), gpu_sensors()
        run = self._drive(phase, watch)
        after = counters(self.http)
        count(run.answers, self.vocabulary)
        for answer in run.answers:
            watch.end(answer.number, answer)
        references = self.settings.references if phase.workload == REFERENCE else {}
        findings = [*watch.findings(), *judge(run.answers, references)]
        moved = {name: after[name] - before[name] for name in after if name in before}
        return _Measured(run=run, findings=findings, moved=moved, sensors={**sensed, **gpu_sensors()})

    def _drive(self, phase: Phase, watch: Watch) -> Run:
        self.client.on_piece = watch.see
        limits = [limit for limit in (self.settings.limit_s, self._left_s()) if limit is not None]
        return self.loop.run(drive(self.client, phase, limit_s=min(limits, default=None)))

    def _left_s(self) -> float | None:
        return None if self.until is None else max(0.0, self.until - now())

    def _reference_phase(self) -> list[Phase]:
        """The reference prompts, as many at once as the workload ever sends: broken kernels often are so at
        some batch sizes alone."""
        if not self.settings.references:
            return []
        asks = [
            Ask(prompt=prompt, max_tokens=REFERENCE_TOKENS, open_ended=True, logprobs=True)
            for prompt in self.settings.references
        ]
        sessions = tuple(Session(asks=(ask,)) for ask in asks)
        places = min(max(self.options.concurrency), len(sessions))
        return [Phase(workload=REFERENCE, concurrency=places, sessions=sessions)]

    def _row(self, measured: list[_Measured]) -> Row:
        findings = [each.findings for each in measured]
        row = summarise([each.run for each in measured], findings, self.settings.slo)
        for each in measured:
            _judge(row, each, self.settings.roof)
        if row.accept_length is None:
            row.accept_length = _accept_length([each.moved for each in measured])
        if measured[0].sensors:
            row.sensors = measured[-1].sensors
        withhold(row)
        return row

    def _vocabulary(self) -> Vocabulary | None:
        if self.settings.tokenizer is not None:
            return LocalVocabulary(self.settings.tokenizer)
        if (found := ServerVocabulary.find(self.http)) is None:
            self.notes.append(
                "no tokenizer: prompt lengths are estimates, and tokens are counted only if the server counts"
            )
        return found

    def _chars_per_token(self) -> float:
        """From how many tokens the server counts in a passage; the default where it does not count."""
        passage = corpus()[:CALIBRATION_CHARS]
        answer = self.loop.run(self.client.ask(Ask(prompt=passage, max_tokens=1), watched=False))
        if answer.usage is None or not answer.usage.prompt_tokens:
            return CHARS_PER_TOKEN
        return len(passage) / answer.usage.prompt_tokens


class _Measured(msgspec.Struct, kw_only=True):
    run: Run
    findings: list[Finding]
    moved: dict[str, float]
    sensors: dict[str, dict[str, float]]


def label(phase: Phase) -> str:
    """A phase in a few words."""
    axes = ", ".join(f"{name} {value}" for name, value in phase.axes.items())
    return f"{phase.workload}: concurrency {phase.concurrency}, {axes}"


def claim_of(run: Run, moved: Mapping[str, float]) -> Claim | None:
    """What the numbers of one run state, for the laws; None for a run without any."""
    row = summarise([run])
    if row.output_tok_s_wall is None:
        return None
    tokens = sum(answer.output_tokens or 0 for answer in run.answers)
    # TPOT and the sum of rates leave out what the first event brings; laws take that for one token
    one_by_one = (row.tokens_in_first_event or 1.0) <= ONE_BY_ONE
    return Claim(
        concurrency=run.phase.concurrency if run.phase.sessions[0].starts_s is None else None,
        requests=row.requests,
        duration_s=run.ended_s - run.began_s,
        requests_per_s=row.requests_per_s,
        output_tok_s=row.output_tok_s_wall,
        output_tok_s_sum=row.output_tok_s_sum if one_by_one else None,
        peak_tok_s=row.output_tok_s_peak,
        ttft_ms=_spread(row.ttft_ms),
        tpot_ms=_spread(row.tpot_ms if one_by_one else None),
        e2e_ms=_spread(row.e2e_ms),
        output_tokens=row.output_tokens,
        total_output_tokens=tokens,
        accept_length=row.accept_length,
        server_output_tokens=moved.get("generated_tokens"),
    )


def _spread(found: dict[str, float] | None) -> Spread:
    return Spread() if found is None else Spread(**found)


def _accept_length(moved: list[dict[str, float]]) -> float | None:
    """Tokens a step and request by the server's own counters of drafts; None where it has none."""
    drafts = sum(counted.get("drafts", 0.0) for counted in moved)
    accepted = sum(counted.get("accepted_drafts", 0.0) for counted in moved)
    return 1.0 + accepted / drafts if drafts else None


def _judge(row: Row, measured: _Measured, roof: Roofline | None) -> None:
    """Holds one run against the laws, its counts against each other, and the server's against ours."""
    for why in _miscounts(measured.run):
        condemn(row, "impossible", why)
    claim = claim_of(measured.run, measured.moved)
    if claim is None or row.failed:
        return
    if roof is not None:
        claim = roof.put_on(claim)
        row.roof_share = None if not claim.roof_tok_s else (claim.output_tok_s or 0.0) / claim.roof_tok_s
    for broken in violations(claim):
        condemn(row, broken.verdict, f"{broken.law}: {broken.why}")


def _miscounts(run: Run) -> list[str]:
    """Answers of which the server counts other tokens than it sent ids of."""
    return [
        f"request {a.number}: usage says {a.usage.completion_tokens} tokens, {told} ids were sent"
        for a in run.answers
        if a.usage is not None and (told := told_ids(a)) is not None
        # an end-of-sequence token is counted, and may not be sent
        if not told <= a.usage.completion_tokens <= told + 1
    ]
