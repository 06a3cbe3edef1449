"""The story of a job, as one follows it: in order, without a gap or a repeat, by any process."""

import asyncio

import pytest
from redis import Redis

from server.errors import InvalidRequest, NotFound
from server.protocol import new_job_id
from server.queue import keys
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import BOOM, RESULT, claim_one, pass_time, submit


async def read(queue, job_id, after="0-0", limit=1000):
    """The events from `after` on, without beats, to the end or `limit`."""
    found = []
    async for event in queue.follow(job_id, after):
        if event is not None:
            found.append(event)
            if len(found) == limit:
                break
    return found


def test_a_finished_story_is_told_at_once(in_queue):
    async def test(queue):
        job_id = await submit(queue)
        held = await claim_one(queue)
        await queue.progress(held, 1, 2)
        await queue.complete(held, RESULT)
        story = await read(queue, job_id)
        assert [event.type for event in story] == ["queued", "started", "progress", "succeeded"]
        assert story[1].fields == {"attempt": "1"}
        assert story[2].fields == {"step": "1", "total": "2"}
        assert [event.last for event in story] == [False, False, False, True]
        for place, event in enumerate(story):  # any of them may have been the last one heard
            assert await read(queue, job_id, event.id) == story[place + 1 :]

    in_queue(test)


def test_events_are_told_as_they_happen(redis_url):
    async def test():
        reader, writer = JobQueue(connect(redis_url)), JobQueue(connect(redis_url))
        try:
            job_id = await submit(writer)
            heard = asyncio.create_task(read(reader, job_id))
            held = await claim_one(writer)
            for step in range(250):  # more than a page
                await writer.progress(held, step, 250)
            await writer.complete(held, RESULT)
            story = await asyncio.wait_for(heard, 20)
        finally:
            await reader.close()
            await writer.close()
        steps = [int(event.fields["step"]) for event in story if event.type == "progress"]
        assert steps == list(range(250))
        assert story[-1].type == "succeeded"

    asyncio.run(test())


def test_a_silent_job_beats(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            job_id = await submit(queue)
            heard = []
            async for event in queue.follow(job_id, beat_s=0.1):
                heard.append(event)
                if len(heard) == 2:
                    break
            assert heard[0].type == "queued"
            assert heard[1] is None
        finally:
            await queue.close()

    asyncio.run(test())


def test_a_job_with_several_attempts_has_one_end(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        await queue.fail(await claim_one(queue), BOOM, retry=True)
        await pass_time(queue, clock, 4)
        await queue.fail(await claim_one(queue), BOOM, retry=False)
        story = [event.type for event in await read(queue, job_id)]
        assert story == ["queued", "started", "queued", "started", "failed"]

    in_queue(test)


def test_when_the_story_has_expired_the_end_is_still_told(in_queue):
    async def test(queue):
        job_id = await submit(queue)
        await queue.cancel(job_id)
        before = (await read(queue, job_id))[0].id
        await queue.redis.delete(keys.events(job_id))  # its hour is over
        (end,) = await read(queue, job_id)
        assert (end.type, end.last) == ("canceled", True)
        assert await read(queue, job_id, before) in ([], [end])
        assert await read(queue, job_id, end.id) == []

    in_queue(test)


def test_a_story_is_bounded_and_ends(in_queue, redis_url):
    async def test(queue):
        job_id = await submit(queue)
        held = await claim_one(queue)
        for step in range(400):
            await queue.progress(held, step, 400)
        await queue.complete(held, RESULT)
        return job_id

    job_id = in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert client.xlen(keys.events(job_id)) == 256
        assert 0 < client.ttl(keys.events(job_id)) <= 3600


def test_unknown_jobs_and_malformed_places(in_queue):
    async def test(queue):
        with pytest.raises(NotFound):
            await read(queue, new_job_id())
        with pytest.raises(InvalidRequest, match="event id"):
            await read(queue, await submit(queue), "yesterday")

    in_queue(test)
