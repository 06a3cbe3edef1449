"""What the scripts cost Redis: microseconds of its own, which a busy machine does not stretch much.

The bounds are several times what was measured: they catch a script that became O(n).
"""

import asyncio

import pytest

from benchmarks.bench_queue import call_times, fill, script_us
from server.queue.connection import connect
from server.queue.jobs import JobQueue

MAX_US = 1000


async def us_per_script(queue, depth):
    await fill(queue, depth - await queue.depth())
    await queue.redis.config_resetstat()
    await call_times(queue)
    return (await script_us(queue.redis))["evalsha"]


@pytest.mark.slow
def test_scripts_cost_little_and_no_more_with_a_long_queue(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            short = await us_per_script(queue, 100)
            long = await us_per_script(queue, 20_000)
        finally:
            await queue.close()
        assert short < MAX_US
        assert long < 3 * short + 50

    asyncio.run(test())
