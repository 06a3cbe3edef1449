"""A fresh queue on the real redis-server, with a clock that stands still."""

import asyncio

import pytest

from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.fakes import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def in_queue(redis_url, clock):
    """Run `async def test(queue)` on a fresh queue; options go to JobQueue."""

    def run(test, **options):
        async def main():
            queue = JobQueue(connect(redis_url), **{"clock_ms": clock, **options})
            try:
                return await test(queue)
            finally:
                await queue.close()

        return asyncio.run(main())

    return run
