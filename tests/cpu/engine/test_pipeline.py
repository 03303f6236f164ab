"""Steps launched before the last one's tokens are known give the same answers, under random traffic, with a
device that runs behind its host.

The device keeps a queue of launched steps, each with the pages and positions of the moment it was launched,
and runs them in order, at the latest when somebody asks for tokens. Its model is a hash of all tokens before,
read back through the pages; so a page that is given away too early, or a token taken from the wrong row,
changes an answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from firebox.cache.kv_cache import CacheSizes, KVCache
from firebox.engine.messages import SamplingParams
from firebox.engine.pipeline import Pipeline
from firebox.engine.request import Request
from firebox.engine.scheduler import Plan, Sampled, Scheduler
from tests.cpu.engine.test_recurrent_states import State, tokens_to
from tests.cpu.engine.test_scheduler import PAGE_TOKENS, next_token

EOS = frozenset(range(0, 900, 23))


class Late:
    """A step on its way; `tokens` once the device has run it."""

    def __init__(self, device: Device, plan: Plan, after: Late | None) -> None:
        self.device = device
        self.requests = [chunk.request for chunk in plan.chunks]
        self.work = []
        for chunk in plan.chunks:
            assert chunk.request.holding is not None and chunk.count == 1 and chunk.samples
            row = after.requests.index(chunk.request) if after and chunk.request in after.requests else None
            known = None if row is not None else chunk.request.token_ids[chunk.start]
            self.work.append((list(chunk.request.holding.page_ids), chunk.start, row, known))
        self.after = after
        self.tokens: list[int] | None = None

    def run(self) -> None:
        self.tokens = []
        for pages, position, row, known in self.work:
            token = known if row is None else self.after.tokens[row]  # type: ignore[union-attr,index]
            self.device.write(pages, position, token)
        for pages, position, _, _ in self.work:
            self.tokens.append(next_token(self.device.read(pages, position + 1)))

    def token_ids(self) -> list[int]:
        self.device.run_until(self)
        assert self.tokens is not None
        return self.tokens


class Device:
    """A runner whose decode steps overlap, unless one of its requests needs the host: every seventh does."""

    late: type[Late] = Late

    def __init__(self, rng: random.Random) -> None:
        self.slots: dict[int, int] = {}
        self.queue: list[Late] = []
        self.rng, self.overlapped, self.longest = rng, 0, 0

    def write(self, pages: list[int], position: int, token: Any) -> None:
        assert isinstance(token, int)
        self.slots[pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS] = token

    def read(self, pages: list[int], count: int) -> list[int]:
        return [self.slots[pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS] for p in range(count)]

    def may_overlap(self, plan: Plan) -> bool:
        return all(c.count == 1 and c.samples and c.request.request_id % 7 for c in plan.chunks)

    def launch(self, plan: Plan, after: Late | None = None) -> Late:
        step = self.late(self, plan, after)
        self.queue.append(step)
        self.overlapped += after is not None
        self.longest = max(self.longest, len(self.queue))
        while self.queue and self.rng.random() < 0.3:  # the device is sometimes quick
            self.queue.pop(0).run()
        return step

    def recover(self, error: Exception) -> None:
        raise error

    def run_until(self, step: Late) -> None:
        while step.tokens is None:
            self.queue.pop(0).run()

    def run(self, plan: Plan) -> list[Sampled]:
        while self.queue:
            self.queue.pop(0).run()
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.count):
                self.write(chunk.request.holding.page_ids, position, chunk.request.token_ids[position])
        return [
            Sampled(
                next_token(self.read(c.request.holding.page_ids, c.start + c.count)) if c.samples else None
            )
            for c in plan.chunks
        ]


class LateWithStates(Late):
    """Advances its requests' states too, after the copies that it was launched with."""

    device: DeviceWithStates

    def __init__(self, device: DeviceWithStates, plan: Plan, after: Late | None) -> None:
        super().__init__(device, plan, after)
        self.copies = plan.state_copies
        self.slots = [chunk.request.holding.state_slot for chunk in plan.chunks if chunk.request.holding]

    def run(self) -> None:
        self.device.copy(self.copies)
        for slot, (pages, position, _, _) in zip(self.slots, self.work, strict=True):
            assert self.device.states[slot] == tuple(self.device.read(pages, position)), "it saw other tokens"
        super().run()
        for slot, (pages, position, _, _) in zip(self.slots, self.work, strict=True):
            self.device.states[slot] = tuple(self.device.read(pages, position + 1))

    def token_ids(self) -> list[int]:
        if self.device.rng.random() < self.device.failing:
            while self in self.device.queue[1:]:
                self.device.queue.pop(0).run()
            self.device.states |= dict.fromkeys(self.slots, (-1,))
            raise RuntimeError("the device failed")
        return super().token_ids()


class DeviceWithStates(Device):
    """`failing`: how often a step fails. What was launched behind it then never runs."""

    late = LateWithStates

    def __init__(self, rng: random.Random, failing: float = 0.0) -> None:
        super().__init__(rng)
        self.states: dict[int, State] = {0: ()}
        self.failing = failing

    def may_overlap(self, plan: Plan) -> bool:
        return super().may_overlap(plan) and self.rng.random() < 0.9

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            self.states[target] = self.states[source]

    def run(self, plan: Plan) -> list[Sampled]:
        while self.queue:
            self.queue.pop(0).run()
        self.copy(plan.state_copies)
        for chunk in plan.chunks:
            tokens, slot = tuple(chunk.request.token_ids), chunk.request.holding.state_slot
            assert self.states[slot] == tokens[: chunk.start], "it saw other tokens"
            self.states[slot] = tokens[: chunk.start + chunk.count]
        return super().run(plan)

    def recover(self, error: Exception) -> None:
        self.queue.clear()

    def check(self, cache: KVCache) -> int:
        """Every snapshot is of the tokens that lead to its node; how many there are."""
        self.copy(cache.state_copies)
        found = [node for node in cache.tree.nodes() if node.state_slot]
        for node in found:
            assert self.states[node.state_slot] == tokens_to(node), "a snapshot that saw other tokens"
        return len(found)


def make(pages: int, running: int = 6, states: int = 0) -> Scheduler:
    return Scheduler(
        KVCache(CacheSizes(pages, PAGE_TOKENS, states=states)),
        max_running_requests=running,
        max_batch_tokens=24,
        prefill_chunk_tokens=8,
        eos_token_ids=EOS,
    )


def alone(prompt: list[int], max_tokens: int) -> tuple[list[int], str]:
    """What a request must produce, and why it ends."""
    known: list[int] = list(prompt)
    while len(known) - len(prompt) < max_tokens:
        known.append(next_token(known))
        if known[-1] in EOS:
            return known[len(prompt) :], "stop"
    return known[len(prompt) :], "length"


Ended = dict[int, tuple[list[int], str]]


def served(scheduler: Scheduler, device: Device, rng: random.Random) -> tuple[Ended, Ended]:
    """Random traffic until all is done: what requests that nobody aborted should have said, and did."""
    pipeline = Pipeline(scheduler, device, goes_on=True)  # type: ignore[arg-type]
    prefixes = [[rng.randrange(50) for _ in range(16)] for _ in range(3)]
    prompts: list[list[int]] = []
    expected: dict[int, tuple[list[int], str]] = {}
    outputs: dict[int, list[int]] = {}
    finished: dict[int, str] = {}
    aborted: set[int] = set()
    for tick in range(3000):
        if tick < 600 and rng.random() < 0.15:
            tail = [rng.randrange(50) for _ in range(rng.randrange(1, 20))]
            prompt = rng.choice(prefixes)[: rng.randrange(17)] + tail
            if prompts and rng.random() < 0.2:
                prompt = rng.choice(prompts)
            prompts.append(prompt)
            max_tokens, number = rng.randrange(0, 25), len(expected) + 1
            params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
            scheduler.add(Request(number, list(prompt), params, priority=rng.choice([0, 0, 1])))
            expected[number] = alone(prompt, max_tokens)
        if rng.random() < 0.03 and expected:
            victim = rng.choice(list(expected))
            if victim not in finished:
                aborted.add(victim)
                scheduler.abort(victim)
        done = pipeline.step()
        if done is None:
            if tick >= 600:
                break
            continue
        for delta in done[1]:
            assert delta.request_id not in finished and delta.request_id not in aborted
            outputs.setdefault(delta.request_id, []).extend(delta.ids)
            if delta.finish_reason:
                finished[delta.request_id] = delta.finish_reason
    assert not pipeline.has_work
    wanted = {number: ended for number, ended in expected.items() if number not in aborted}
    return wanted, {number: (outputs.get(number, []), finished[number]) for number in wanted}


@pytest.mark.parametrize("pages", [16, 30, 200])
@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(pages: int, seed: int) -> None:
    rng = random.Random(seed)
    scheduler, device = make(pages), Device(rng)
    wanted, found = served(scheduler, device, rng)
    assert found == wanted
    assert scheduler.cache.available_pages == pages, "pages leaked"
    assert device.overlapped > 50 and device.longest >= 2, "too few steps overlapped: the test is too weak"
    assert sum(reason == "stop" for _, reason in found.values()) > 3


@pytest.mark.parametrize("pages", [16, 200])
@pytest.mark.parametrize("seed", range(10))
def test_states_between_steps_that_overlap(pages: int, seed: int) -> None:
    """A state is copied after the step that fills a page and before the next, which is launched by then."""
    rng = random.Random(seed)
    scheduler, device = make(pages, states=16), DeviceWithStates(rng)
    wanted, found = served(scheduler, device, rng)
    assert found == wanted
    cache = scheduler.cache
    assert (cache.available_pages, cache.available_states) == (pages, 16), "pages or states leaked"
    assert device.check(cache) > 2 and scheduler.stats().cached_prompt_tokens > 50
    assert device.overlapped > 25 and device.longest >= 2, "too few steps overlapped: the test is too weak"


@pytest.mark.parametrize("seed", range(10))
def test_states_after_steps_that_fail(seed: int) -> None:
    """The requests of a step that fails end with an error; copies behind it are not believed in."""
    rng = random.Random(seed)
    scheduler, device = make(200, states=64), DeviceWithStates(rng, failing=0.08)
    wanted, found = served(scheduler, device, rng)
    failed = {number for number, (_, reason) in found.items() if reason == "error"}
    assert len(failed) > 5 and len(found) - len(failed) > 20
    for number in wanted.keys() - failed:
        assert found[number] == wanted[number], f"request {number}"
    assert (scheduler.cache.available_pages, scheduler.cache.available_states) == (200, 64)
    device.check(scheduler.cache)


def test_a_copy_that_a_void_step_was_to_make_is_not_believed_in() -> None:
    """The first request ends at the end of a page; its state is copied by the step after next, which was
    launched when the next one fails."""
    rng = random.Random(0)
    rng.random = lambda: 0.5  # type: ignore[method-assign]
    scheduler, device = make(200, states=16), DeviceWithStates(rng)
    pipeline = Pipeline(scheduler, device, goes_on=True)  # type: ignore[arg-type]
    for number, max_tokens in ((1, PAGE_TOKENS), (2, 30)):
        scheduler.add(Request(number, [number], SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
    for _ in range(PAGE_TOKENS):
        pipeline.step()
    assert [request.request_id for request in scheduler.running] == [2]
    assert device.queue, "the next step is on its way"
    device.failing = 1.0
    pipeline.step()
    assert not scheduler.has_work
    assert device.check(scheduler.cache) == 0 and scheduler.cache.available_states == 16


def test_in_the_steady_state_a_step_is_always_on_its_way_when_tokens_are_asked_for() -> None:
    scheduler, device = make(200), Device(random.Random(0))
    device.rng.random = lambda: 1.0  # type: ignore[method-assign] # the device never runs unasked
    pipeline = Pipeline(scheduler, device)  # type: ignore[arg-type]
    for number in (1, 2, 3):
        scheduler.add(Request(number, [number], SamplingParams(max_tokens=20, ignore_eos=True)))
    steps = 0
    while pipeline.step() is not None:
        steps += 1
    assert steps == 20 and device.overlapped == 19, "every step but the first"
    assert device.longest == 2


def test_nobody_waits_while_a_place_is_free() -> None:
    scheduler, device = make(200, running=2), Device(random.Random(0))
    pipeline = Pipeline(scheduler, device)  # type: ignore[arg-type]
    scheduler.add(Request(1, [1], SamplingParams(max_tokens=30, ignore_eos=True)))
    for _ in range(5):
        pipeline.step()
    scheduler.add(Request(2, [2], SamplingParams(max_tokens=3, ignore_eos=True)))
    plans = [pipeline.step()[0] for _ in range(3)]  # type: ignore[index]
    assert [len(plan.chunks) for plan in plans] == [1, 2, 2], "one step is on its way; the next takes it in"
