"""Rows "half-open connection", "reset after submit" and "2 s latency", with a proxy in between."""

import asyncio
import time

import pytest

from server.errors import QueueUnavailable
from server.protocol import new_job_id
from server.queue.connection import connect
from server.queue.jobs import Idempotency, JobQueue
from tests.server.queue.helpers import RESULT, claim_one, spec, submit
from tests.tcp_proxy import proxy

pytestmark = pytest.mark.slow


@pytest.fixture
def through_a_proxy(redis_url):
    """Run `async def test(queue, proxy)`."""

    def run(test):
        async def main():
            async with proxy(redis_url.removeprefix("unix://")) as line:
                queue = JobQueue(connect(line.url))
                try:
                    await test(queue, line)
                finally:
                    await queue.close()

        asyncio.run(main())

    return run


def test_a_half_open_connection_costs_each_call_five_seconds_at_most(through_a_proxy):
    async def test(queue, line):
        await asyncio.gather(*(submit(queue) for _ in range(5)))  # several pooled connections
        line.silent = True
        started = time.monotonic()
        with pytest.raises(QueueUnavailable):
            await submit(queue)
        assert time.monotonic() - started < 6
        line.silent = False
        started, before = time.monotonic(), line.connections
        await submit(queue)  # none of the other silent connections is tried
        assert time.monotonic() - started < 2
        assert line.connections > before

    through_a_proxy(test)


def test_a_retry_after_a_lost_answer_is_the_same_job(through_a_proxy):
    async def test(queue, line):
        await queue.depth()
        key, first = Idempotency("k", "body"), new_job_id()
        await submit(queue)  # the memory was looked at, the scripts are known
        line.lose_answers = True
        with pytest.raises(QueueUnavailable):
            await queue.submit(first, spec(), idempotency=key)
        line.lose_answers = False
        again = await queue.submit(new_job_id(), spec(), idempotency=key)
        assert again.id == first
        assert await queue.depth() == 2

    through_a_proxy(test)


def test_two_seconds_of_latency_are_survived(through_a_proxy):
    async def test(queue, line):
        await queue.preflight()  # as every process does: sends the scripts
        await submit(queue)
        line.delay_s = 1.0  # each way
        held = await claim_one(queue)
        assert await queue.complete(held, RESULT)

    through_a_proxy(test)
