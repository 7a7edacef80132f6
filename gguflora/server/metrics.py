"""Prometheus metrics: the engine's statistics, and the durations of requests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguflora.engine import Engine, Generation

__all__ = ["CONTENT_TYPE", "Metrics", "RequestTimer"]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class _EngineCollector(Collector):
    """Reads the engine's statistics whenever the metrics are read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Yield the engine's statistics as metrics."""
        stats = self._engine.stats()
        yield _counter("prompt_tokens", "Prompt tokens of ended requests.", stats.prompt_tokens)
        yield _counter("reused_tokens", "Prompt tokens found in a KV cache.", stats.reused_tokens)
        yield _counter("completion_tokens", "Generated tokens of ended requests.", stats.completion_tokens)
        yield _counter("decoded_tokens", "Tokens decoded by the model.", stats.decoded_tokens)
        yield _counter("swaps", "Times that other adapters were applied to all tokens of a batch.", stats.swaps)
        yield _counter("mixed_steps", "Batches of several adapter sets.", stats.mixed_steps)
        yield _counter("single_steps", "Batches of one adapter set.", stats.single_steps)
        yield _gauge("queued", "Requests waiting to start.", stats.queued)
        yield _gauge("running", "Requests being answered.", stats.running)
        yield _gauge("contexts", "Contexts in memory.", len(stats.contexts))
        yield _gauge("kv_bytes", "Bytes of all KV caches.", stats.kv_bytes)
        yield _gauge("adapters", "Loaded adapters.", stats.adapters)
        ended = CounterMetricFamily("gguflora_answers", "Ended answers by reason.", labels=["reason"])
        for reason, count in stats.requests.items():
            ended.add_metric([reason], count)
        yield ended


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"gguflora_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"gguflora_{name}", text, value=value)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._requests = Counter(
            "gguflora_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = self._histogram(
            "request_seconds", "Time from a request to the end of its response.", ["endpoint"]
        )
        self._first = self._histogram("time_to_first_token_seconds", "Time from submission to the first token.")
        self._queue = self._histogram("queue_seconds", "Time spent waiting to start.")

    def _histogram(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"gguflora_{name}", text, labels, buckets=_SECONDS, registry=self._registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Record a response and its duration."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def finished(self, generations: Sequence[Generation]) -> None:
        """Record the timings of generations that have succeeded."""
        for generation in generations:
            self._first.observe(generation.timings.ttft)
            self._queue.observe(generation.timings.queue)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestTimer:
    """ASGI middleware that counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record it when its response is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_and_record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_record_status)
        finally:
            route = scope.get("route")  # unknown paths share one label: clients must not be able to add labels
            endpoint = getattr(route, "path", "other")
            self._metrics.answered(endpoint, status, time.perf_counter() - started)
