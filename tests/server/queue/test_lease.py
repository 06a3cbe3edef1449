"""Leases: heartbeats, fences, the reaper, and mercy after an outage."""

from redis import Redis

from server.queue import keys
from server.queue.jobs import WORKER_LOST
from tests.server.queue.helpers import (
    BOOM,
    POOL,
    RESULT,
    claim,
    claim_one,
    pass_time,
    submit,
)


def test_heartbeats_keep_the_lease(in_queue, clock):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        for _ in range(5):
            clock.advance(10)
            assert await queue.heartbeat("w1", POOL, [held]) == []
            assert await queue.reap() == 0
        clock.advance(14.9)
        assert await queue.reap() == 0
        clock.advance(0.2)
        assert await queue.reap() == 1

    in_queue(test)


def test_a_stale_claim_is_refused_everywhere(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        stale = await claim_one(queue, "w1")
        clock.advance(16)
        assert await queue.reap() == 1
        fresh = await claim_one(queue, "w2")
        assert fresh.claim_no == stale.claim_no + 1
        assert fresh.solo
        assert await queue.progress(stale, 1, 4) == "lost"
        assert not await queue.complete(stale, RESULT)
        assert not await queue.fail(stale, BOOM, retry=False)
        assert not await queue.release(stale)
        assert await queue.heartbeat("w1", POOL, [stale]) == [(stale, "lost")]
        assert (await queue.get(job_id)).status == "running"
        assert await queue.complete(fresh, RESULT)
        assert not await queue.complete(stale, RESULT)

    in_queue(test)


def test_a_lost_job_is_dead_after_its_attempts(in_queue, clock, redis_url):
    async def test(queue):
        job_id = await submit(queue)
        for attempt in (1, 2, 3):
            assert (await claim_one(queue)).attempts == attempt
            if attempt < 3:
                assert await pass_time(queue, clock, 16) == 1
                assert await pass_time(queue, clock, 10) == 0  # wakes who waited long enough
        assert await pass_time(queue, clock, 16) == 1
        record = await queue.get(job_id)
        assert (record.status, record.error) == ("failed", WORKER_LOST)
        assert record.expires_ms - record.finished_ms == 7 * 24 * 3600 * 1000
        assert await claim(queue) == []

    in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert client.zcard(keys.DEAD) == 1


def test_the_second_loss_waits_out_a_backoff(in_queue, clock):
    async def test(queue):
        await submit(queue)
        await claim_one(queue)
        await pass_time(queue, clock, 16)
        await claim_one(queue)  # the first time at once
        await pass_time(queue, clock, 14)
        assert await pass_time(queue, clock, 1) == 1
        assert await claim(queue) == []
        assert await queue.depth() == 1
        await pass_time(queue, clock, 3)
        await claim_one(queue)

    in_queue(test)


def test_refused_writes_and_reclaimed_jobs_are_counted(in_queue, clock):
    async def test(queue):
        await submit(queue)
        stale = await claim_one(queue)
        assert await queue.stats() == {"fenced": 0, "reclaimed": 0}
        await pass_time(queue, clock, 16)
        assert not await queue.complete(stale, RESULT)
        assert await queue.stats() == {"fenced": 1, "reclaimed": 1}

    in_queue(test)


def test_after_an_outage_healthy_workers_may_renew_before_anything_is_taken(in_queue, clock):
    async def test(queue):
        await submit(queue, tenant="a")
        await submit(queue, tenant="b")
        healthy, silent = await claim_one(queue, "healthy"), await claim_one(queue, "silent")
        await queue.reap()
        clock.advance(60)  # nobody could reach Redis
        assert await queue.reap() == 0
        assert await queue.heartbeat("healthy", POOL, [healthy]) == []
        assert await pass_time(queue, clock, 6) == 1
        assert await queue.complete(healthy, RESULT)
        assert not await queue.complete(silent, RESULT)

    in_queue(test)


def test_the_mercy_is_given_once_however_seldom_anybody_reaps(in_queue, clock):
    async def test(queue):
        await submit(queue)
        await claim_one(queue)
        await queue.reap()
        taken = []
        for _ in range(4):
            clock.advance(20)
            taken.append(await queue.reap())
        assert taken == [0, 1, 0, 0]

    in_queue(test)


def test_clock_of_the_client_does_not_matter(in_queue, clock, redis_url):
    """Row "client clock +-10 min": production time is the server's (see test_watch)."""

    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        assert await queue.reap() == 0
        score = await queue.redis.zscore(keys.LEASE, held.job_id)
        seconds, micros = await queue.redis.time()
        assert abs(score - (seconds * 1000 + micros // 1000) - 15_000) < 2_000

    in_queue(test, clock_ms=None)


def test_a_running_job_without_a_lease_is_found(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        await claim_one(queue)
        assert await queue.reconcile() == 0
        await queue.redis.zrem(keys.LEASE, job_id)
        assert await queue.reconcile() == 1
        clock.advance(1)
        assert await queue.reap() == 1
        assert (await claim_one(queue)).job_id == job_id

    in_queue(test)


def test_a_backoff_never_grows_beyond_a_minute(in_queue, clock):
    async def test(queue):
        job_id = await submit(queue)
        await queue.redis.hset(keys.job(job_id), "attempts", 500)
        await queue.fail(await claim_one(queue), BOOM, retry=True)
        await pass_time(queue, clock, 76)  # a minute and its jitter
        assert (await claim_one(queue)).job_id == job_id

    in_queue(test, max_attempts=1000)


def test_last_words_may_be_said_twice_and_are_no_stale_writes(in_queue, clock):
    """After a lost answer a worker says it again; a heartbeat may cross the commit."""

    async def test(queue):
        for last_word in (
            lambda held: queue.fail(held, BOOM, retry=True),
            lambda held: queue.fail(held, BOOM, retry=False),
            queue.release,
            lambda held: queue.complete(held, RESULT),
        ):
            await submit(queue)
            held = await claim_one(queue)
            assert await last_word(held)
            assert await queue.heartbeat("w1", POOL, [held]) == [(held, "ended")]
            assert await last_word(held)
            clock.advance(60)
            await queue.reap()
            for again in await claim(queue, max_jobs=9):
                assert not await queue.complete(held, RESULT)
                await queue.cancel(again.job_id)
                assert await queue.heartbeat("w1", POOL, [again]) == [(again, "canceled")]
        assert (await queue.stats())["fenced"] == 0

    in_queue(test)


def test_every_stale_write_is_counted(in_queue, clock):
    async def test(queue):
        await submit(queue)
        stale = await claim_one(queue)
        await pass_time(queue, clock, 16)
        for write in (
            lambda: queue.heartbeat("w1", POOL, [stale]),
            lambda: queue.progress(stale, 1, 4),
            lambda: queue.put_preview(stale, b""),
            lambda: queue.complete(stale, RESULT),
            lambda: queue.fail(stale, BOOM, retry=True),
            lambda: queue.release(stale),
        ):
            before = (await queue.stats())["fenced"]
            await write()
            assert (await queue.stats())["fenced"] == before + 1

    in_queue(test)
