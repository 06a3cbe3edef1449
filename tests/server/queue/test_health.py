"""Preflight, memory and the epoch."""

import asyncio
import contextlib

import pytest

from server.errors import QueueFull, QueueUnavailable
from server.queue import keys
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import BOOM, POOL, RESULT, claim, claim_one, submit


@contextlib.asynccontextmanager
async def configured(queue, **options):
    """Redis with some settings, as they were afterwards."""
    names = {name.replace("_", "-"): value for name, value in options.items()}
    before = {name: (await queue.redis.config_get(name))[name] for name in names}
    try:
        for name, value in names.items():
            await queue.redis.config_set(name, value)
        yield
    finally:
        for name, value in before.items():
            await queue.redis.config_set(name, value)


def test_preflight_is_content_with_our_own_redis(in_queue):
    async def test(queue):
        assert await queue.preflight() == []

    in_queue(test)


def test_preflight_warns_of_eviction_and_of_no_persistence(in_queue):
    async def test(queue):
        async with configured(queue, maxmemory_policy="allkeys-lru", appendonly="no"):
            eviction, persistence = await queue.preflight()
        assert "allkeys-lru" in eviction
        assert "nothing is kept" in persistence

    in_queue(test)


async def settled_memory(queue):
    """Bytes in use, once Redis no longer frees what earlier tests left."""
    before = 0
    while True:
        used = (await queue.redis.info("memory"))["used_memory"]
        if abs(used - before) < 0.02 * used:
            return used
        before = used
        await asyncio.sleep(0.3)


def test_new_work_is_refused_when_memory_runs_short(in_queue):
    async def test(queue):
        await submit(queue)  # the scripts take memory too
        used = await settled_memory(queue)
        async with configured(queue, maxmemory=used * 10):
            await queue.memory_ratio(0.0)
            assert 0.05 < await queue.memory_ratio() < 0.8
        async with configured(queue, maxmemory=int(used * 1.1)):
            await submit(queue)  # the last look is younger than five seconds
            await queue.memory_ratio(0.0)  # as upkeep does every second
            with pytest.raises(QueueFull, match="memory"):
                await submit(queue)

    in_queue(test)


def test_redis_at_maxmemory(in_queue, clock):
    """Row: new work 503; running work keeps its leases and commits."""

    async def test(queue):
        ids = [await submit(queue) for _ in range(6)]
        held = await claim(queue, max_jobs=5)
        done, failed, released, gone, kept = held
        async with configured(queue, maxmemory=1):
            await queue.memory_ratio(0.0)
            with pytest.raises(QueueFull):
                await submit(queue)
            queue._memory_at += 60.0
            queue._memory_ratio = 0.0
            with pytest.raises(QueueUnavailable, match="maxmemory"):
                await submit(queue)
            assert await queue.heartbeat("w1", POOL, held) == []
            assert await queue.heartbeat("w2", POOL, []) == []
            assert await queue.progress(kept, 1, 2) == "held"
            assert await queue.complete(done, RESULT)
            assert not await queue.complete(done.__class__(**vars(done) | {"claim_no": 7}), RESULT)
            assert await queue.fail(failed, BOOM, retry=True)
            assert await queue.release(released)
            assert (await queue.cancel(gone.job_id)).status == "canceled"
            (queued,) = await claim(queue, "w3")  # what waits gets done: that frees memory
            assert await queue.complete(queued, RESULT)
            clock.advance(16)
            assert await queue.reap() == 1
            assert await queue.reconcile() == 0
        assert (await queue.get(ids[0])).status == "succeeded"

    in_queue(test)


def another(redis_url, clock):
    return JobQueue(connect(redis_url), clock_ms=clock)


def test_flushall_is_noticed_by_those_who_knew_better(in_queue, redis_url, clock):
    async def test(queue):
        await submit(queue)
        await queue.reap()
        assert queue.data_lost == ""
        await queue.redis.flushall()
        await queue.reap()
        assert "epoch is gone" in queue.data_lost
        late = another(redis_url, clock)  # a process that starts meanwhile learns of it too
        await late.reap()
        assert late.data_lost == queue.data_lost
        await late.accept_epoch()
        assert late.data_lost == ""
        for process in (queue, late):
            await process.reap()
            assert process.data_lost == ""
        await late.close()

    in_queue(test)


def test_a_new_epoch_nobody_accepted_is_a_loss(in_queue, redis_url, clock):
    async def test(queue):
        await queue.reap()
        await queue.redis.flushall()
        fresh = another(redis_url, clock)
        await fresh.reap()  # knows nothing of a history
        assert fresh.data_lost == ""
        await queue.reap()
        assert "another" in queue.data_lost
        await fresh.reap()
        assert "another" in fresh.data_lost
        await fresh.close()

    in_queue(test)


@pytest.mark.parametrize("last", ["submit", "complete", "cancel"])
def test_going_back_in_time_is_a_loss(in_queue, last):
    async def test(queue):
        job_id = await submit(queue)
        held = await claim_one(queue)
        await queue.reap()
        before = await queue.redis.get(keys.SEQ)
        if last == "submit":
            await submit(queue)
        elif last == "complete":
            await queue.complete(held, RESULT)
        else:
            await queue.cancel(job_id)
        await queue.redis.set(keys.SEQ, before)  # as a Redis that lost its last write
        await queue.reap()
        assert "newest changes are gone" in queue.data_lost

    in_queue(test)


def test_an_unbroken_history_raises_no_alarm(in_queue, redis_url, clock):
    async def test(queue):
        other = another(redis_url, clock)
        for process in (queue, other) * 3:
            await submit(process)
            await process.complete(await claim_one(process), RESULT)
            await process.reap()
            assert process.data_lost == ""
        await other.close()

    in_queue(test)
