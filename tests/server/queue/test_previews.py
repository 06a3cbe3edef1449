"""Previews: for those who look, by the claim that holds, and not for long."""

import pytest
from redis import Redis

from server.protocol import new_job_id
from server.queue import keys
from tests.server.queue.helpers import RESULT, claim_one, spec, submit

PICTURE = b"\xff\xd8\x00\x80 no text"


def test_a_preview_is_the_latest_and_lives_a_minute(in_queue, redis_url):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        assert await queue.preview(held.job_id) is None
        assert await queue.put_preview(held, b"earlier") == "held"
        assert await queue.put_preview(held, PICTURE) == "held"
        assert await queue.preview(held.job_id) == PICTURE
        return held.job_id

    job_id = in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert 0 < client.pttl(keys.preview(job_id)) <= 60_000


def test_partial_pictures_stay_apart(in_queue):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        for image, number in [(0, 0), (0, 1), (1, 0)]:
            await queue.put_partial(held, image, number, bytes([image, number]))
        assert await queue.partial(held.job_id, 0, 1) == bytes([0, 1])
        assert await queue.partial(held.job_id, 1, 0) == bytes([1, 0])
        assert await queue.partial(held.job_id, 1, 1) is None
        assert await queue.preview(held.job_id) is None

    in_queue(test)


def test_a_stale_claim_shows_nothing(in_queue, clock):
    async def test(queue):
        await submit(queue)
        stale = await claim_one(queue)
        clock.advance(16)
        await queue.reap()
        fresh = await claim_one(queue, "w2")
        assert await queue.put_preview(stale, PICTURE) == "lost"
        assert await queue.preview(fresh.job_id) is None

    in_queue(test)


def test_somebody_looks_for_a_minute_from_the_submission_on_if_asked(in_queue, redis_url):
    async def test(queue):
        asked, not_asked = new_job_id(), await submit(queue)
        await queue.submit(asked, spec(), watched=True)
        assert await queue.watched([not_asked, asked]) == {asked}
        await queue.watch(not_asked)
        assert await queue.watched([not_asked, asked]) == {not_asked, asked}
        assert await queue.watched([]) == set()
        return asked, not_asked

    with Redis.from_url(redis_url) as client:
        for job_id in in_queue(test):
            assert 0 < client.pttl(keys.watch(job_id)) <= 60_000


def test_a_preview_has_64_kib_at_most(in_queue):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        await queue.put_preview(held, bytes(64 * 1024))
        with pytest.raises(ValueError, match="65536"):
            await queue.put_preview(held, bytes(64 * 1024 + 1))
        assert await queue.complete(held, RESULT)

    in_queue(test)
