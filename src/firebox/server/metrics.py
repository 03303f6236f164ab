"""/metrics: what the server times itself, and the engine's counters and gauges as of its last step."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from firebox.engine.client import AsyncEngine

TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The metrics of one server. `watch()` gives a stopwatch for one answer."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineStats(engine))
        self._requests = Counter(
            "firebox_requests",
            "HTTP requests by route and status",
            ("route", "status"),
            registry=self._registry,
        )
        self._request_s = Histogram(
            "firebox_request_seconds",
            "From a request's arrival to its last byte",
            ("route",),
            buckets=REQUEST_S,
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "firebox_time_to_first_token_seconds",
            "From submission to an answer's first token",
            buckets=TTFT_S,
            registry=self._registry,
        )
        self.inter_token_s = Histogram(
            "firebox_inter_token_latency_seconds",
            "Between the tokens of one answer",
            buckets=INTER_TOKEN_S,
            registry=self._registry,
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts one finished request; `route` is the path as the route writes it, not as the client did."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(seconds)

    def watch(self) -> AnswerWatch:
        """A stopwatch that starts now."""
        return AnswerWatch(self)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class AnswerWatch:
    """Times one answer's tokens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last_s = time.perf_counter()
        self._began = False

    def tokens(self, count: int) -> None:
        """`count` tokens have come just now; several at once share the time since the last ones."""
        if count == 0:
            return
        now_s = time.perf_counter()
        waited_s, self._last_s = now_s - self._last_s, now_s
        if not self._began:
            self._began = True
            self._metrics.first_token_s.observe(waited_s)
            return
        for _ in range(count):
            self._metrics.inter_token_s.observe(waited_s / count)


class _EngineStats(Collector):
    """Reads `engine.stats` when asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily(
            "firebox_engine_up", "1 while the engine process lives", float(self._engine.died is None)
        )
        yield GaugeMetricFamily(
            "firebox_requests_running", "Requests computed in each step", stats.running_requests
        )
        yield GaugeMetricFamily(
            "firebox_requests_waiting", "Requests waiting for a place", stats.waiting_requests
        )
        memory = GaugeMetricFamily(
            "firebox_memory_bytes",
            "The engine's memory by use: planned with before loading, and measured after it",
            labels=("use", "kind"),
        )
        for line in self._engine.ready.memory:
            memory.add_metric((line.what, "budget"), line.budget_bytes)
            if line.measured_bytes is not None:
                memory.add_metric((line.what, "measured"), line.measured_bytes)
        yield memory
        pages = GaugeMetricFamily(
            "firebox_kv_pages", "KV pages: all, free, and held by the prefix tree", labels=("state",)
        )
        for state in ("total", "free", "cached"):
            pages.add_metric((state,), getattr(stats, f"kv_pages_{state}"))
        yield pages
        for name, help, value in (
            ("prompt_tokens", "Prompt tokens taken in", stats.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens found in the prefix cache", stats.cached_prompt_tokens),
            ("generated_tokens", "Tokens generated", stats.generated_tokens),
            ("retractions", "Requests put back because KV pages ran out", stats.retractions),
            ("aborted_requests", "Requests given up by their clients", stats.aborted_requests),
            ("failed_requests", "Requests ended because their step failed", stats.failed_requests),
            ("finished_requests", "Requests that ended by themselves", stats.finished_requests),
            ("engine_steps", "Forward passes", stats.steps),
            ("engine_step_seconds", "Time in forward passes", stats.step_seconds),
        ):
            yield CounterMetricFamily(f"firebox_{name}", help, value)
        steps = CounterMetricFamily(
            "firebox_steps", "Forward passes by how they ran and why", labels=("mode", "reason")
        )
        for mode, count in stats.step_modes.items():
            steps.add_metric(mode.split("/", 1), count)
        yield steps
        captured = self._engine.captured.values()
        held = [graph for graph in captured if graph.error is None]
        for name, help, value in (
            ("cuda_graphs", "Batch sizes whose decode step is captured", len(held)),
            ("cuda_graphs_failed", "Batch sizes whose last capture failed", len(captured) - len(held)),
            ("cuda_graph_bytes", "GPU memory that captures took", sum(graph.bytes for graph in held)),
            ("cuda_graph_seconds", "Time that steps waited for captures", sum(g.seconds for g in captured)),
        ):
            yield GaugeMetricFamily(f"firebox_{name}", help, value)
