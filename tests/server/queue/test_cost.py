"""What the scripts cost Redis: microseconds of its own (`INFO commandstats`), and processor time.

The bounds are several times what was measured (`make bench-queue`): they catch a script that became
O(n), and one that does much more than before. A busy machine stretches the microseconds, so the
least of several rounds counts.
"""

import asyncio

import pytest

from benchmarks.bench_queue import cost_of_calls, cpu_us_per_job, fill, redis_us_per_job
from server.queue.connection import connect
from server.queue.jobs import JobQueue

MAX_US = 1000
MAX_US_PER_JOB = 2000
MAX_CPU_US_PER_JOB = 1000
ROUNDS = 3


async def own_us(queue, depth, number):
    await fill(queue, depth - await queue.depth())
    rounds = [await cost_of_calls(queue, number) for _ in range(ROUNDS)]
    return {name: min(costs[name]["redis_us"] for costs in rounds) for name in rounds[0]}


def check(redis_url, long_depth, number):
    async def measure():
        queue = JobQueue(connect(redis_url))
        try:
            job = min([await redis_us_per_job(queue, 400) for _ in range(ROUNDS)])
            cpu = await cpu_us_per_job(queue, 800)
            assert cpu["redis"] < MAX_CPU_US_PER_JOB
            return job, await own_us(queue, 100, number), await own_us(queue, long_depth, number)
        finally:
            await queue.close()

    job, short, long = asyncio.run(measure())
    assert job < MAX_US_PER_JOB
    assert {name for name, us in short.items() if us > MAX_US} == set()
    assert {name: (short[name], us) for name, us in long.items() if us > 2 * short[name] + 60} == {}


@pytest.mark.slow
def test_scripts_cost_little_and_no_more_with_a_long_queue(redis_url):
    check(redis_url, 5_000, 30)


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_scripts_cost_no_more_with_a_hundred_thousand_jobs(redis_url):
    check(redis_url, 100_000, 150)
