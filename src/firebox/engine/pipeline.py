"""Plan, run, apply: one step after the other, or, where the runner can, one step ahead of its results.

    step N      launched ─────────────── tokens known ─ applied
    step N + 1            planned ahead, launched ──────────────── tokens known ─ applied

The device then never waits for the host. What only tokens tell comes one step late: a request that ended by
an end-of-sequence token is still in step N + 1, whose token for it is passed over, and nobody is told of it.
Where what comes next depends on more than that (someone may be admitted, a prompt goes on, pages run out),
the step is waited for first.

A step that raises is run again, and where it raises again, half of its requests at a time: those that raise
alone end with an error, and the others never know. A step may be run twice because it writes
the same keys and values to the same places; recurrent states it changes, so with these all of the step's
requests end.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from firebox.engine.messages import Delta
from firebox.engine.runner import Runner, in_words
from firebox.engine.scheduler import Chunk, Plan, Sampled, Scheduler

AGAIN = "run again after a failure"
log = logging.getLogger(__name__)


class Pipeline:
    """One scheduler and one runner. `goes_on`: after steps that raise, as above; otherwise `step` raises."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, goes_on: bool = False) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._goes_on = goes_on
        self._ahead: tuple[Plan, Any] | None = None

    @property
    def has_work(self) -> bool:
        """Is a request there, or a step on its way?"""
        return self.scheduler.has_work or self._ahead is not None

    def step(self) -> tuple[Plan, list[Delta]] | None:
        """Finishes the next step; None when there is nothing to do. Raises EngineDied where none can
        follow."""
        plan = self.scheduler.plan() if self._ahead is None else self._ahead[0]
        if plan is None:
            return None
        try:
            sampled = self._sampled(plan)
        except Exception as error:
            self._ahead = None
            if not self._goes_on:
                raise
            return plan, self._after_failure(plan, error)
        return plan, self.scheduler.apply(plan, sampled)

    def _sampled(self, plan: Plan) -> list[Sampled]:
        """Runs the plan, or waits for it if it is on its way; then the next may be."""
        if self._ahead is None:
            if not self.runner.may_overlap(plan):
                return self.runner.run(plan)
            self._ahead = plan, self.runner.launch(plan)
        (_, launched), self._ahead = self._ahead, None
        following = self.scheduler.plan_ahead(plan)
        if following is not None:
            if self.runner.may_overlap(following):
                self._ahead = following, self.runner.launch(following, launched)
            else:
                self.scheduler.take_back(following)
        return [Sampled(token_id) for token_id in launched.token_ids()]

    def _after_failure(self, plan: Plan, error: Exception) -> list[Delta]:
        self.runner.recover(error)
        log.error("a step of %d requests failed: %s", len(plan.chunks), in_words(error))
        if self.scheduler.cache.has_states:
            return self.scheduler.fail(plan, in_words(error))
        return self._again(plan.chunks)

    def _again(self, chunks: tuple[Chunk, ...]) -> list[Delta]:
        """Runs these chunks together, or in halves."""
        plan = Plan(tuple(chunk for chunk in chunks if self.scheduler.is_running(chunk.request)))
        if not plan.chunks:
            return []
        why, half = "", len(plan.chunks) // 2
        for way in self._ways(plan):
            try:
                with way:
                    sampled = self.runner.run(plan)
            except Exception as error:  # noqa: BLE001 (whatever it is, it ends one request, not all)
                self.runner.recover(error)
                why = in_words(error)
            else:
                return self.scheduler.apply(plan, sampled)
        if not half:
            log.error("request %d ends with an error: %s", plan.chunks[0].request.request_id, why)
            return self.scheduler.fail(plan, why)
        return self._again(plan.chunks[:half]) + self._again(plan.chunks[half:])

    def _ways(self, plan: Plan) -> Iterator[contextlib.AbstractContextManager[None]]:
        """From a graph that is there, which takes no memory; then launch by launch, if that may be."""
        decodes = all(chunk.count == 1 and chunk.samples for chunk in plan.chunks)
        only = decodes and self.runner.graphs_only
        if only or (decodes and self.runner.captured(len(plan.chunks)) is not None):
            yield contextlib.nullcontext()
        if not only:
            yield self.runner.eagerly(AGAIN)
