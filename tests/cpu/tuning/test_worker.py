"""The measuring process: what it answers, and what a candidate costs that hangs, dies or is wrong."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

import pytest

from firebox.hardware.base import Gpu, find_gpu
from firebox.tuning.base import Candidate, Option, Task
from firebox.tuning.clock import Effort
from firebox.tuning.worker import ANSWERS, BEGINS, FAILS, SECONDS, Worker

TASK = Task("experts", "key", "problem", 16)
EFFORT = Effort(samples=2, sample_ms=1.0)


def serve(pipe: Connection, gpu: Gpu) -> None:
    """Answers as the measuring process does; some names are traps. Whatever it starts is told apart by its
    process id."""
    while True:
        order = pipe.recv()
        timed = []
        for name in order.names:
            pipe.send((BEGINS, name, None))
            if "dies" in name:
                os._exit(7)
            if "hangs" in name:
                time.sleep(60)
            if "wrong" in name:
                pipe.send((FAILS, name, "wrong: relative error 0.5"))
            else:
                timed.append(name)
        for name in timed:
            pipe.send((ANSWERS, name, [float(os.getpid())] * order.effort.samples))
        pipe.send((SECONDS, "", 0.25))


def candidates(*names: str) -> list[Candidate]:
    return [Candidate(name, "part", None, None) for name in names]


@pytest.fixture
def worker() -> Worker:
    return Worker(find_gpu("h200"), limit_s=20.0, serve=serve)


def test_answers_come_in_the_order_of_the_candidates(worker: Worker) -> None:
    with worker:
        found = worker.samples(TASK, candidates("a", "wrong", "b"), EFFORT)
        assert found[1] == "wrong: relative error 0.5"
        assert found[0] == found[2] and len(found[0]) == 2
        assert worker.further(TASK, Option("a", {"part": candidates("a")[0]}, 0.0), EFFORT) == found[0]
    assert worker.seconds == 0.5


def test_a_candidate_that_kills_the_process_costs_itself_alone(worker: Worker) -> None:
    with worker:
        before, *_ = worker.samples(TASK, candidates("a"), EFFORT)
        good, bad, after = worker.samples(TASK, candidates("a", "dies", "b"), EFFORT)
    assert bad == "the process died (exit 7)"
    assert good == after and good != before, "a new process measured those that were left"


def test_a_candidate_that_hangs_is_ended() -> None:
    began = time.monotonic()
    with Worker(find_gpu("h200"), limit_s=6.0, serve=serve) as worker:
        bad, good = worker.samples(TASK, candidates("hangs", "b"), EFFORT)
        pid = int(good[0])  # type: ignore[arg-type]
    assert bad == "took longer than 6 s" and time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
