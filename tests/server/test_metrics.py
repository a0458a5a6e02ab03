from relaxlm.engine.types import (
    ChoiceUpdate,
    EngineStats,
    RequestTimings,
    TokenText,
    Update,
)
from relaxlm.openai_api.errors import ApiError
from relaxlm.runtime.sampling import Sampled
from relaxlm.server.metrics import Metrics


def tokens(count: int, index: int = 0) -> tuple[ChoiceUpdate, ...]:
    token = TokenText(Sampled(1, None, ()), "x")
    return (ChoiceUpdate(index, (token,) * count, "x" * count),)


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_engine_s_counters_are_those_of_the_moment() -> None:
    stats = EngineStats(
        waiting=1,
        running=2,
        pages_total=30,
        pages_used=4,
        pages_cached=5,
        prefix_tokens=60,
        prefix_hits=7,
        preemptions=8,
        drafted_tokens=9,
        accepted_tokens=3,
        finished=11,
        failed=12,
        cancelled=13,
        prompt_tokens=14,
        generated_tokens=15,
        batch_sizes={1: 10, 3: 2, 200: 1},
    )
    metrics = Metrics(lambda: stats)
    found = samples(metrics)
    expected = {
        "relaxlm_requests_waiting": 1,
        "relaxlm_requests_running": 2,
        "relaxlm_kv_pages": 30,
        "relaxlm_kv_pages_used": 4,
        "relaxlm_kv_pages_cached": 5,
        "relaxlm_prefix_cache_lookup_tokens_total": 60,
        "relaxlm_prefix_cache_hit_tokens_total": 7,
        "relaxlm_preemptions_total": 8,
        "relaxlm_speculative_drafted_tokens_total": 9,
        "relaxlm_speculative_accepted_tokens_total": 3,
        "relaxlm_prompt_tokens_total": 14,
        "relaxlm_generated_tokens_total": 15,
        'relaxlm_requests_total{outcome="finished"}': 11,
        'relaxlm_requests_total{outcome="failed"}': 12,
        'relaxlm_requests_total{outcome="cancelled"}': 13,
        'relaxlm_batch_size_bucket{le="2.0"}': 10,
        'relaxlm_batch_size_bucket{le="4.0"}': 12,
        'relaxlm_batch_size_bucket{le="+Inf"}': 13,
        "relaxlm_batch_size_count": 13,
        "relaxlm_batch_size_sum": 216,
    }
    assert {name: found.get(name) for name in expected} == expected
    stats.waiting = 0
    assert samples(metrics)["relaxlm_requests_waiting"] == 0


def test_times_come_from_a_request_s_updates() -> None:
    metrics = Metrics(EngineStats)
    metrics.updated(Update(1, at=10.0, choices=tokens(1)))
    metrics.updated(Update(2, at=10.5, choices=tokens(1)))
    metrics.updated(Update(1, at=11.0, choices=tokens(2)))  # one of them was guessed
    metrics.updated(Update(1, at=11.2, choices=tokens(1, index=1)))  # another reply's first
    metrics.updated(Update(1, at=11.5, timings=RequestTimings(2.0, 3.0, 4.0, 4), finished=True))
    found = samples(metrics)
    assert found["relaxlm_inter_token_latency_seconds_count"] == 2
    assert found["relaxlm_inter_token_latency_seconds_sum"] == 1.0
    assert found["relaxlm_queue_time_seconds_sum"] == 2.0
    assert found["relaxlm_time_to_first_token_seconds_sum"] == 5.0
    assert found["relaxlm_request_duration_seconds_sum"] == 9.0


def test_a_request_without_a_token_has_no_first_one() -> None:
    metrics = Metrics(EngineStats)
    metrics.updated(Update(1, at=1.0, timings=RequestTimings(2.0, 0.0, 0.0, 0), finished=True))
    found = samples(metrics)
    assert found["relaxlm_queue_time_seconds_count"] == 1
    assert found["relaxlm_time_to_first_token_seconds_count"] == 0
    assert not metrics._running


def test_errors_and_responses_are_counted_by_what_they_are() -> None:
    metrics = Metrics(EngineStats)
    metrics.failed(ApiError("no", 429, "rate_limit_error", code="queue_full"))
    metrics.responded({"method": "GET", "path": "/any/thing"}, 404)
    metrics.responded({"method": "BREW", "path": "/other"}, 404)
    found = samples(metrics)
    assert found['relaxlm_errors_total{code="queue_full",type="rate_limit_error"}'] == 1
    name = 'relaxlm_http_responses_total{method="any",route="other",status="404"}'
    assert found[name] == 2


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(EngineStats), Metrics(EngineStats)
    one.failed(ApiError("no"))
    assert len(samples(other)) < len(samples(one))
