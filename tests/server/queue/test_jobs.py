import asyncio
import contextlib
from collections import Counter

import pytest
from redis import Redis

from server.errors import InvalidRequest, NotFound, QueueFull, QueueUnavailable
from server.protocol import JobError, JobResult, JobSpec, ModelInfo, StepCounts, Timings, new_job_id
from server.queue import keys
from server.queue.connection import connect
from server.queue.jobs import WORKER_LOST, JobQueue
from tests.fakes import FAKE_INFO, FakeClock

POOL = "default"
BOOM = JobError(code="internal", detail="boom")
RESULT = JobResult(
    images=(),
    timings=Timings(queue_s=0, encode_s=0, denoise_s=0, decode_s=0, store_s=0, total_s=0),
    steps=StepCounts(computed=4, skipped=0, cfg=4),
    warnings=(),
    model="fake",
)


def spec(prompt="a red circle", **fields):
    return JobSpec(prompt=prompt, seed=1, **fields)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def in_queue(redis_url, clock):
    """Run `async def test(queue)` on a fresh queue with a clock that stands still."""

    def run(test, **options):
        async def main():
            queue = JobQueue(connect(redis_url), clock_ms=clock, **options)
            try:
                return await test(queue)
            finally:
                await queue.close()

        return asyncio.run(main())

    return run


async def submit(queue, **options):
    return (await queue.submit(new_job_id(), spec(), **options)).id


async def claim(queue, worker="w1", max_jobs=1, max_cost=1e9, idle=True):
    return await queue.claim(worker, POOL, max_jobs, max_cost, idle=idle)


async def claim_one(queue, worker="w1"):
    (only,) = await claim(queue, worker)
    return only


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


def test_submitting_again_is_the_same_job(in_queue):
    async def test(queue):
        job_id = new_job_id()
        await queue.submit(job_id, spec("first"))
        again = await queue.submit(job_id, spec("second"))
        assert again.spec.prompt == "first"
        assert await queue.depth() == 1

    in_queue(test)


def test_the_depth_cap_refuses_and_frees_again(in_queue):
    async def test(queue):
        first = await submit(queue)
        await submit(queue)
        with pytest.raises(QueueFull):
            await submit(queue)
        assert (await queue.submit(first, spec())).id == first  # a repetition is no new job
        await claim_one(queue)
        await submit(queue)

    in_queue(test, queue_limit=2)


@pytest.mark.parametrize("options", [{"tenant": "a:b"}, {"pool": "../x"}, {"priority": "urgent"}])
def test_names_that_would_break_keys_are_refused(in_queue, options):
    async def test(queue):
        with pytest.raises(InvalidRequest):
            await submit(queue, **options)

    in_queue(test)


def test_unknown_jobs(in_queue):
    async def test(queue):
        for job_id in (new_job_id(), "no-id", "*"):
            assert await queue.get(job_id) is None
            assert await queue.cancel(job_id) is None
            with pytest.raises(NotFound):
                await queue.wait(job_id, 1)

    in_queue(test)


def test_claims_are_oldest_first_and_bounded(in_queue):
    async def test(queue):
        ids = [await submit(queue, cost_ms=100) for _ in range(5)]
        assert [c.job_id for c in await claim(queue, max_jobs=2)] == ids[:2]
        assert [c.job_id for c in await claim(queue, max_cost=250, max_jobs=9)] == ids[2:4]
        assert await claim(queue, max_cost=50, idle=False) == []
        assert [c.job_id for c in await claim(queue, max_cost=50, idle=True)] == ids[4:]

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


def test_committing_twice_after_a_lost_reply_is_one_success(in_queue):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        assert await queue.complete(held, RESULT)
        assert await queue.complete(held, RESULT)

    in_queue(test)


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


def test_a_lost_job_is_dead_after_its_attempts(in_queue, clock, redis_url):
    async def test(queue):
        job_id = await submit(queue)
        for attempt in (1, 2, 3):
            assert (await claim_one(queue)).attempts == attempt
            if attempt < 3:
                clock.advance(16)
                assert await queue.reap() == 1
                clock.advance(10)
                assert await queue.reap() == 0  # takes nothing back, wakes who waited long enough
        clock.advance(16)
        assert await queue.reap() == 1
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
        clock.advance(16)
        await queue.reap()
        await claim_one(queue)  # the first time at once
        clock.advance(16)
        await queue.reap()
        assert await claim(queue) == []
        assert await queue.depth() == 1
        clock.advance(3)
        await queue.reap()
        await claim_one(queue)

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


def test_a_solo_job_runs_alone_and_does_not_starve(in_queue, clock):
    async def test(queue):
        poison = await submit(queue)
        await claim_one(queue, "dead")
        clock.advance(16)
        await queue.reap()
        others = [await submit(queue) for _ in range(3)]
        # One busy worker stops claiming, so that it gets idle; a second one goes on.
        assert await claim(queue, "busy", idle=False) == []
        assert [c.job_id for c in await claim(queue, "second", idle=False)] == others[:1]
        assert await claim(queue, "busy", idle=False) == []
        (alone,) = await claim(queue, "busy", max_jobs=8, idle=True)
        assert (alone.job_id, alone.solo) == (poison, True)
        assert len(await claim(queue, "second", max_jobs=8, idle=False)) == 2

    in_queue(test)


def test_priorities_share_by_weight(in_queue):
    async def test(queue):
        for priority in ("low", "normal", "high"):
            for _ in range(70):
                await submit(queue, priority=priority, cost_ms=10)
        order = [(await queue.get((await claim_one(queue)).job_id)).priority for _ in range(63)]
        assert Counter(order) == pytest.approx({"low": 3, "normal": 12, "high": 48}, abs=2)
        assert set(order[:6]) == {"low", "normal", "high"}

    in_queue(test)


def test_a_trickle_of_low_priority_gains_nothing_by_pausing(in_queue):
    async def test(queue):
        for _ in range(40):
            await submit(queue, priority="normal", cost_ms=10)
        low, waiting = 0, ""
        for _ in range(30):
            if not low or (await queue.get(waiting)).status != "queued":
                waiting = await submit(queue, priority="low", cost_ms=10)
                low += 1
            await claim_one(queue)
        assert low - 1 <= 30 / 5 + 1

    in_queue(test)


def test_a_crowd_does_not_hold_up_a_quiet_tenant(in_queue):
    async def test(queue):
        for _ in range(20):
            await submit(queue, tenant="noisy", cost_ms=10)
        for _ in range(4):
            await claim_one(queue)
        await submit(queue, tenant="quiet", cost_ms=10)
        tenants = [(await claim_one(queue)).tenant for _ in range(2)]
        assert "quiet" in tenants

    in_queue(test)


def test_costly_jobs_count_for_more(in_queue):
    async def test(queue):
        for _ in range(40):
            await submit(queue, tenant="large", cost_ms=300)
            await submit(queue, tenant="small", cost_ms=100)
        shares = Counter([(await claim_one(queue)).tenant for _ in range(40)])
        assert shares == pytest.approx({"small": 30, "large": 10}, abs=1)

    in_queue(test)


def test_waiters_wake_on_the_end_and_on_the_timeout(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            job_id = await submit(queue)
            assert (await queue.wait(job_id, 0.05)).status == "queued"
            waiter = asyncio.create_task(queue.wait(job_id, 10))
            held = await claim_one(queue)
            await asyncio.sleep(0.1)
            started = asyncio.get_running_loop().time()
            await queue.complete(held, RESULT)
            assert (await waiter).status == "succeeded"
            assert asyncio.get_running_loop().time() - started < 0.5
        finally:
            await queue.close()

    asyncio.run(test())


def test_an_idle_worker_is_woken_by_a_submission(redis_url):
    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            sleeper = asyncio.create_task(queue.wait_for_work(POOL, 2))
            await asyncio.sleep(0.05)
            await submit(queue)
            await asyncio.wait_for(sleeper, 0.5)
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


def test_scripts_survive_a_script_flush(in_queue, redis_url):
    async def test(queue):
        await submit(queue)
        with Redis.from_url(redis_url) as client:
            client.script_flush()
        assert await queue.complete(await claim_one(queue), RESULT)

    in_queue(test)


def test_everything_that_ended_expires(in_queue, redis_url):
    async def test(queue):
        for end in ("complete", "fail", "cancel"):
            job_id = await submit(queue)
            if end == "cancel":
                await queue.cancel(job_id)
            elif end == "fail":
                await queue.fail(await claim_one(queue), BOOM, retry=False)
            else:
                await queue.complete(await claim_one(queue), RESULT)

    in_queue(test)
    with Redis.from_url(redis_url, decode_responses=True) as client:
        lasting = {key for key in client.keys("*") if client.ttl(key) == -1}
    assert lasting == {keys.SEQ, keys.PREFIX + "served:default"}


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


def test_models_and_workers_are_known(in_queue, clock):
    async def test(queue):
        assert await queue.model_info() is None
        assert await queue.pools() == []
        await queue.publish_model(POOL, FAKE_INFO)
        assert await queue.model_info() == FAKE_INFO
        assert isinstance(await queue.model_info(), ModelInfo)
        assert await queue.pools() == [POOL]
        assert await queue.workers() == []
        await submit(queue)
        held = await claim_one(queue, "w1")
        await queue.heartbeat("w1", POOL, [held])
        await queue.heartbeat("w2", POOL, [])
        assert [(w.id, w.running) for w in await queue.workers()] == [("w1", 1), ("w2", 0)]
        await queue.sign_off("w2", POOL)
        assert [w.id for w in await queue.workers()] == ["w1"]

    in_queue(test)


def test_a_spec_nobody_can_read_fails_its_job_only(in_queue):
    async def test(queue):
        job_id = await submit(queue)
        await queue.redis.hset(keys.job(job_id), "spec", '{"version": 99}')
        good = await submit(queue)
        assert [c.job_id for c in await claim(queue, max_jobs=5)] == [good]
        status = await queue.redis.hget(keys.job(job_id), "status")
        assert status == "failed"

    in_queue(test)


def test_no_redis_is_one_clear_error():
    async def test():
        queue = JobQueue(connect("redis://127.0.0.1:1/0"))
        for call in (queue.ping(), queue.get(new_job_id()), queue.submit(new_job_id(), spec())):
            with pytest.raises(QueueUnavailable, match="does not answer"):
                await call
        with contextlib.suppress(QueueUnavailable):
            await queue.close()

    asyncio.run(test())
