"""Plan, run, apply: one step after the other, or, where the runner can, one step ahead of its results.

    step N      launched ─────────────── tokens known ─ applied
    step N + 1            planned ahead, launched ──────────────── tokens known ─ applied

The device then never waits for the host. What only tokens tell comes one step late: a request that ended by
an end-of-sequence token is still in step N + 1, whose token for it is passed over, and nobody is told of it.
Where what comes next depends on more than that (someone may be admitted, a prompt goes on, pages run out),
the step is waited for first.
"""

from __future__ import annotations

from typing import Any

from firebox.engine.messages import Delta
from firebox.engine.runner import Runner
from firebox.engine.scheduler import Plan, Sampled, Scheduler


class Pipeline:
    """One scheduler and one runner."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._ahead: tuple[Plan, Any] | None = None

    @property
    def has_work(self) -> bool:
        """Is a request there, or a step on its way?"""
        return self.scheduler.has_work or self._ahead is not None

    def step(self) -> tuple[Plan, list[Delta]] | None:
        """Finishes the next step; None when there is nothing to do."""
        scheduler, runner = self.scheduler, self.runner
        if self._ahead is None:
            plan = scheduler.plan()
            if plan is None:
                return None
            if not runner.may_overlap(plan):
                return plan, scheduler.apply(plan, runner.run(plan))
            self._ahead = plan, runner.launch(plan)
        (plan, launched), self._ahead = self._ahead, None
        following = scheduler.plan_ahead(plan)
        if following is not None and runner.may_overlap(following):
            self._ahead = following, runner.launch(following, launched)
        return plan, scheduler.apply(plan, [Sampled(token_id) for token_id in launched.token_ids()])
