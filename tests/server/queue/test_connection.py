"""The line to Redis: one error, cancellations that get through, scripts that are sent again."""

import asyncio
import contextlib

import pytest
from redis import Redis

from server.errors import QueueUnavailable
from server.protocol import new_job_id
from server.queue.connection import connect, guarded
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import RESULT, claim_one, spec, submit


def test_no_redis_is_one_clear_error():
    async def test():
        queue = JobQueue(connect("redis://127.0.0.1:1/0"))
        for call in (queue.ping(), queue.get(new_job_id()), queue.submit(new_job_id(), spec())):
            with pytest.raises(QueueUnavailable, match="does not answer"):
                await call
        with contextlib.suppress(QueueUnavailable):
            await queue.close()

    asyncio.run(test())


def test_scripts_survive_a_script_flush(in_queue, redis_url):
    async def test(queue):
        await submit(queue)
        with Redis.from_url(redis_url) as client:
            client.script_flush()
        assert await queue.complete(await claim_one(queue), RESULT)

    in_queue(test)


def test_a_cancellation_gets_through_a_client_that_swallows_it():
    async def stubborn():
        for _ in range(3):  # as `asyncio.wait_for` may, up to Python 3.11
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
        return "an answer nobody waits for"

    async def test():
        task = asyncio.create_task(guarded(stubborn()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(test(), 5))
