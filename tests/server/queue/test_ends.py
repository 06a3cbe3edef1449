"""Ends: results, failures, releases, cancellations, deadlines; each job has exactly one."""

import pytest
from redis import Redis

from server.queue import keys
from server.queue.jobs import Idempotency
from server.queue.records import DEADLINE_MISSED
from tests.server.queue.helpers import (
    BOOM,
    POOL,
    RESULT,
    claim,
    claim_one,
    pass_time,
    spec,
    submit,
)


def test_a_job_lives_from_submission_to_result(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        record = await queue.get(job_id)
        assert (record.status, record.position, record.attempts) == ("queued", 1, 0)
        assert record.spec == spec()
        clock.advance(2.5)
        held = await claim_one(queue)
        assert (held.job_id, held.waited_ms, held.attempts) == (job_id, 2500, 1)
        assert await queue.progress(held, 3, 4) == "held"
        record = await queue.get(job_id)
        assert (record.status, record.step, record.total) == ("running", 3, 4)
        assert record.worker == "w1"
        clock.advance(1)
        assert await queue.complete(held, RESULT)
        record = await queue.get(job_id)
        assert (record.status, record.result, record.position) == ("succeeded", RESULT, None)
        assert record.finished_ms - record.submitted_ms == 3500
        assert record.expires_ms == record.finished_ms + 24 * 3600 * 1000

    in_queue(test)


def test_committing_twice_after_a_lost_reply_is_one_success(in_queue):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        assert await queue.complete(held, RESULT)
        assert await queue.complete(held, RESULT)

    in_queue(test)


@pytest.mark.parametrize("last_word", ["release", "fail"])
def test_an_earlier_claim_has_no_part_in_a_later_ones_success(in_queue, clock, last_word):
    """Its pictures are not those of the result: it must hear so, and remove them."""

    async def test(queue):
        await submit(queue)
        early = await claim_one(queue, "w1")
        if last_word == "release":
            assert await queue.release(early)
        else:
            assert await queue.fail(early, BOOM, retry=True)
        clock.advance(60)
        await queue.reap()
        later = await claim_one(queue, "w1")
        assert await queue.complete(later, RESULT)
        assert not await queue.complete(early, RESULT)
        assert await queue.complete(later, RESULT)

    in_queue(test)


def test_fail_retries_with_backoff_then_buries(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        for _ in range(2):
            assert await queue.fail(await claim_one(queue), BOOM, retry=True)
            assert (await queue.get(job_id)).status == "queued"
            assert await claim(queue) == []
            clock.advance(10)
            await queue.reap()
        assert await queue.fail(await claim_one(queue), BOOM, retry=True)
        record = await queue.get(job_id)
        assert (record.status, record.attempts, record.error) == ("failed", 3, BOOM)

    in_queue(test)


def test_fail_without_retry_is_final(in_queue):
    async def test(queue):
        job_id = await submit(queue)
        assert await queue.fail(await claim_one(queue), BOOM, retry=False)
        record = await queue.get(job_id)
        assert (record.status, record.error) == ("failed", BOOM)

    in_queue(test)


def test_release_refunds_the_attempt_and_keeps_the_place(in_queue):
    async def test(queue):
        first, second = await submit(queue), await submit(queue)
        held = await claim_one(queue)
        assert await queue.release(held)
        record = await queue.get(first)
        assert (record.status, record.attempts, record.position) == ("queued", 0, 1)
        again = await claim(queue, max_jobs=2)
        assert [c.job_id for c in again] == [first, second]
        assert again[0].claim_no == held.claim_no + 1  # the fence is never refunded
        assert not again[0].solo

    in_queue(test)


def test_cancel_queued_running_and_finished(in_queue):
    async def test(queue):
        running, queued = await submit(queue), await submit(queue)
        held = await claim_one(queue)
        for job_id in (queued, running):
            assert (await queue.cancel(job_id)).status == "canceled"
        assert await claim(queue) == []
        assert await queue.depth() == 0
        assert await queue.heartbeat("w1", POOL, [held]) == [(held, "canceled")]
        assert await queue.progress(held, 1, 4) == "canceled"
        assert not await queue.complete(held, RESULT)
        done = await submit(queue)
        await queue.complete(await claim_one(queue), RESULT)
        assert (await queue.cancel(done)).status == "succeeded"

    in_queue(test)


def test_cancel_while_a_retry_waits(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        await queue.fail(await claim_one(queue), BOOM, retry=True)
        assert (await queue.cancel(job_id)).status == "canceled"
        clock.advance(60)
        await queue.reap()
        assert await claim(queue) == []

    in_queue(test)


def test_everything_that_ended_expires(in_queue, clock, redis_url):
    async def test(queue):
        for end in ("complete", "fail", "cancel", "expire"):
            key = Idempotency(end, "body")
            job_id = await submit(queue, deadline_s=60, idempotency=key)
            if end == "cancel":
                await queue.cancel(job_id)
            elif end == "expire":
                clock.advance(61)
                await queue.reap()
            elif end == "fail":
                await queue.fail(await claim_one(queue), BOOM, retry=False)
            else:
                await queue.complete(await claim_one(queue), RESULT)

    in_queue(test)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        lasting = {key for key in client.keys("*") if client.ttl(key) == -1}
    assert lasting == {keys.SEQ, keys.EPOCH, keys.PREFIX + "served:default"}


@pytest.mark.parametrize("found_by", ["reaper", "claim"])
def test_a_queued_job_expires_at_its_deadline(in_queue, clock, found_by):
    async def test(queue):
        late, good = await submit(queue, deadline_s=5), await submit(queue)
        clock.advance(5)
        if found_by == "reaper":
            await queue.reap()
        assert [c.job_id for c in await claim(queue, max_jobs=5)] == [good]
        record = await queue.get(late)
        assert (record.status, record.error) == ("expired", DEADLINE_MISSED)
        assert record.deadline_ms == record.submitted_ms + 5000
        assert await queue.depth() == 0
        assert await queue.redis.zcard(keys.DEADLINE) == 0

    in_queue(test)


def test_a_running_job_expires_at_its_next_step(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue, deadline_s=5)
        held = await claim_one(queue)
        assert await queue.progress(held, 1, 4) == "held"
        clock.advance(5)
        assert await queue.progress(held, 2, 4) == "expired"
        assert await queue.heartbeat("w1", POOL, [held]) == [(held, "expired")]
        assert not await queue.complete(held, RESULT)
        assert (await queue.get(job_id)).status == "expired"

    in_queue(test)


@pytest.mark.parametrize("place", ["scheduled", "solo"])
def test_a_job_that_waits_for_another_attempt_expires_too(in_queue, clock, place):
    async def test(queue):
        job_id = await submit(queue, deadline_s=16)
        held = await claim_one(queue)
        if place == "scheduled":
            await queue.fail(held, BOOM, retry=True)
            clock.advance(16)
            await queue.reap()
        else:
            await pass_time(queue, clock, 15)
            clock.advance(1)
        assert await claim(queue) == []
        assert (await queue.get(job_id)).status == "expired"
        clock.advance(60)
        await queue.reap()
        assert await claim(queue) == []

    in_queue(test)


def test_a_result_in_time_takes_the_deadline_away(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue, deadline_s=5)
        await queue.complete(await claim_one(queue), RESULT)
        clock.advance(60)
        await queue.reap()
        assert (await queue.get(job_id)).status == "succeeded"

    in_queue(test)
