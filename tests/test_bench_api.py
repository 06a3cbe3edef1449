"""The benchmark of API and queue: its sums, and that it runs. Seconds are judged elsewhere."""

import asyncio
from itertools import pairwise

import pytest

from benchmarks.bench_api import ENGINE_S, Sample, arrivals, figures, measure, service


def sample(beyond_ms):
    """A request that took so much longer than its steps: 14 ms of it by the worker's clock."""
    stages = {"queue_s": 0.001, "encode_s": 0.002, "decode_s": 0.003, "store_s": 0.004}
    timings = stages | {"denoise_s": ENGINE_S + 0.004}
    timings["total_s"] = sum(timings.values())
    return Sample(ENGINE_S + beyond_ms / 1000, timings)


def test_overhead_is_what_is_not_the_engine():
    refused = Sample(9.0, refusal="503 queue-full")
    result = figures([refused, *(sample(float(ms)) for ms in range(20, 120))], rate=20.0)
    assert result["beyond_the_steps_ms"] == {"p50": 70.0, "p95": 115.0, "p99": 119.0, "max": 119.0}
    assert result["api_and_queue_ms"] == {"p50": 61.0, "p95": 106.0, "p99": 110.0, "max": 110.0}
    parts = {name: row["p50"] for name, row in result["of_which_ms"].items()}
    assert parts == {"queue": 1, "store": 4, "http and waking": 56}
    assert (result["requests"], result["refused"]) == (101, {"503 queue-full": 1})


def test_requests_are_due_at_random_moments_of_the_rate_asked_for():
    async def moments(seed):
        return [due async for due in arrivals(5000.0, 0.2, seed)]

    times = asyncio.run(moments(1))
    assert times == sorted(times)
    assert 800 < len(times) < 1200  # a Poisson number of mean 1000
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.2)  # as of an exponential distribution


@pytest.mark.very_slow
def test_it_measures_a_service(tmp_path):
    with service(tmp_path) as (url, pids):
        samples, cpu = asyncio.run(measure(url, pids, rate=5.0, duration_s=1.5))
    served = [each for each in samples if not each.refusal]
    assert served
    assert min(each.api_and_queue_ms for each in served) > 0
    assert all(each.timings["denoise_s"] >= ENGINE_S for each in served)
    assert set(cpu) == {"api", "worker"}
