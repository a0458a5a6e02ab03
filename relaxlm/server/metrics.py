"""What Prometheus reads: the engine's counters, times of requests, and responses.

Each `Metrics` has a registry of its own, so that several servers can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.types import Scope

from relaxlm.engine.types import EngineStats, Update
from relaxlm.openai_api.errors import ApiError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. From a small model on a fast machine to a long prompt on a slow one.
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)

_GAUGES = {
    "relaxlm_requests_waiting": ("waiting", "Requests that no step has taken up yet."),
    "relaxlm_requests_running": ("running", "Requests whose prompt or reply is being computed."),
    "relaxlm_kv_pages": ("pages_total", "Pages of the KV cache."),
    "relaxlm_kv_pages_used": ("pages_used", "Pages held by running requests."),
    "relaxlm_kv_pages_cached": ("pages_cached", "Pages held for later requests alone."),
}
_COUNTERS = {
    "relaxlm_prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "relaxlm_generated_tokens": ("generated_tokens", "Tokens of replies."),
    "relaxlm_prefix_cache_lookup_tokens": (
        "prefix_tokens",
        "Tokens of prompts that were looked up in the prefix cache.",
    ),
    "relaxlm_prefix_cache_hit_tokens": ("prefix_hits", "Those of them that were found there."),
    "relaxlm_preemptions": (
        "preemptions",
        "Times that a reply gave up its pages to others, to be computed again later.",
    ),
    "relaxlm_speculative_drafted_tokens": ("drafted_tokens", "Tokens that were guessed."),
    "relaxlm_speculative_accepted_tokens": ("accepted_tokens", "Guesses that were right."),
    "relaxlm_steps": ("steps", "Steps of the engine."),
    "relaxlm_step_seconds": ("step_seconds", "Time of the steps, in the model and around it."),
    "relaxlm_forward_seconds": ("forward_seconds", "Time of the steps in the model."),
}
_OUTCOMES = ("finished", "failed", "cancelled")


class Metrics:
    """
    Args:
        stats: the engine's counters.
    """

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(stats))
        self._first_token = Histogram(
            "relaxlm_time_to_first_token_seconds",
            "From a request's submission until its first token was computed.",
            buckets=_LATENCIES,
            registry=registry,
        )
        self._inter_token = Histogram(
            "relaxlm_inter_token_latency_seconds",
            "Time between two tokens of a reply.",
            buckets=_TOKEN_LATENCIES,
            registry=registry,
        )
        self._queued = Histogram(
            "relaxlm_queue_time_seconds",
            "From a request's submission until a step took up its prompt.",
            buckets=_LATENCIES,
            registry=registry,
        )
        self._duration = Histogram(
            "relaxlm_request_duration_seconds",
            "From a request's submission until its last token was computed.",
            buckets=_LATENCIES,
            registry=registry,
        )
        self._responses = Counter(
            "relaxlm_http_responses",
            "Responses by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._errors = Counter(
            "relaxlm_errors",
            "Errors told to clients, in responses and in streams.",
            ("type", "code"),
            registry=registry,
        )
        self.connections = Gauge("relaxlm_http_connections", "Open connections.", registry=registry)
        self._running: dict[int, _Request] = {}

    def text(self) -> bytes:
        """In Prometheus's text format, of type CONTENT_TYPE."""
        return generate_latest(self.registry)

    def updated(self, update: Update) -> None:
        """Take note of a request's news; from one thread at a time."""
        request = self._running.setdefault(update.request_id, _Request({}))
        for choice in update.choices:
            if not choice.tokens:
                continue
            last = request.last_token.get(choice.index)
            if last is not None:
                each = (update.at - last) / len(choice.tokens)
                for _ in choice.tokens:  # several at once were guessed
                    self._inter_token.observe(each)
            request.last_token[choice.index] = update.at
        if update.finished:
            del self._running[update.request_id]
        timings = update.timings
        if timings is not None and update.error is None:
            self._queued.observe(timings.queued)
            if timings.generated_tokens:
                self._first_token.observe(timings.queued + timings.prefill)
                self._duration.observe(timings.queued + timings.prefill + timings.decode)

    def responded(self, scope: Scope, status: int) -> None:
        """Count a response, by its route and not by its path, of which there are endless ones."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "any"
        self._responses.labels(route, method, str(status)).inc()

    def failed(self, error: ApiError) -> None:
        self._errors.labels(error.type, error.code or "").inc()


@dataclass
class _Request:
    """When the last token of each reply was computed."""

    last_token: dict[int, float]


class _EngineCollector(Collector):
    """The engine's counters at the moment that they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(stats, field))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, field))
        requests = CounterMetricFamily(
            "relaxlm_requests", "Requests that have ended.", labels=["outcome"]
        )
        for outcome in _OUTCOMES:
            requests.add_metric([outcome], getattr(stats, outcome))
        yield requests
        yield _batch_sizes(stats.batch_sizes)


def _batch_sizes(counts: Mapping[int, int]) -> Metric:
    bounds = [(str(float(bound)), bound) for bound in _BATCHES]
    buckets: list[tuple[str, float]] = [
        (name, sum(n for size, n in counts.items() if size <= bound)) for name, bound in bounds
    ]
    buckets.append(("+Inf", sum(counts.values())))
    return HistogramMetricFamily(
        "relaxlm_batch_size",
        "Sequences in a step of the engine.",
        buckets=buckets,
        sum_value=sum(size * n for size, n in counts.items()),
    )
