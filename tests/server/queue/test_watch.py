"""Waiting for jobs and for work, and the story each job tells."""

import asyncio

from redis import Redis

from server.queue import keys
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import POOL, RESULT, claim_one, submit


def test_waiters_wake_on_the_end_and_on_the_timeout(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        queue._changes.poll_s = 3600.0  # only a message can wake
        try:
            job_id = await submit(queue)
            assert (await queue.wait(job_id, 0.05)).status == "queued"
            waiter = asyncio.create_task(queue.wait(job_id, 60))
            held = await claim_one(queue)
            await asyncio.sleep(0.1)
            await queue.complete(held, RESULT)
            assert (await asyncio.wait_for(waiter, 30)).status == "succeeded"
        finally:
            await queue.close()

    asyncio.run(test())


def test_an_idle_worker_is_woken_by_a_submission(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            assert not await queue.wait_for_work(POOL, 0.05)
            sleeper = asyncio.create_task(queue.wait_for_work(POOL, 2))
            await asyncio.sleep(0.05)
            await submit(queue)
            assert await sleeper
        finally:
            await queue.close()

    asyncio.run(test())


def test_production_time_is_the_servers(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            record = await queue.get(await submit(queue))
            seconds, _ = await queue.redis.time()
            assert abs(record.submitted_ms / 1000 - seconds) < 5
        finally:
            await queue.close()

    asyncio.run(test())


def test_events_tell_the_story(in_queue, redis_url):
    async def test(queue):
        job_id = await submit(queue)
        held = await claim_one(queue)
        await queue.progress(held, 1, 2)
        await queue.complete(held, RESULT)
        return job_id

    job_id = in_queue(test)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        story = [fields["type"] for _, fields in client.xrange(keys.events(job_id))]
    assert story == ["queued", "started", "progress", "succeeded"]
