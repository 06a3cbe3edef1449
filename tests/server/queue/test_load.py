"""How much work there is, and what the scripts tell the metrics."""

import pytest

from server import metrics
from server.protocol import PRIORITIES
from tests.server.queue.helpers import BOOM, POOL, RESULT, claim_one, submit


def counted(metric, *labels):
    """The value of a counter before and after; call the result for the difference."""
    child = metric.labels(*labels)
    before = child._value.get()
    return lambda: child._value.get() - before


def test_the_load_of_a_pool_by_priority(in_queue, clock):
    async def test(queue):
        for tenant, priority, cost_ms in (
            ("a", "normal", 4000), ("a", "normal", 1000), ("b", "normal", 500), ("a", "high", 2000),
        ):  # fmt: skip
            await submit(queue, tenant=tenant, priority=priority, cost_ms=cost_ms)
            clock.advance(1.0)
        held = await claim_one(queue)
        assert held.cost_ms == 2000  # the high one
        await queue.progress(held, 1, 4)
        load = await queue.load(POOL)
        assert set(load) == set(PRIORITIES)
        normal, high, low = load["normal"], load["high"], load["low"]
        assert (normal.queued, normal.work_s, normal.running, normal.oldest_s) == (3, 5.5, 0, 4.0)
        assert (high.queued, high.running, high.running_work_s, high.oldest_s) == (0, 1, 1.5, 0)
        assert (low.queued, low.work_s, low.running, low.oldest_s) == (0, 0, 0, 0)
        assert (await queue.load("other"))["normal"].queued == 0

    in_queue(test)


def test_jobs_that_wait_out_a_backoff_or_run_alone_are_counted_too(in_queue, clock):
    async def test(queue):
        await submit(queue)
        await queue.fail(await claim_one(queue), BOOM, retry=True)
        assert (await queue.load(POOL))["normal"].queued == 1
        lost = await submit(queue)
        while (await claim_one(queue)).job_id != lost:
            pass
        clock.advance(20.0)
        await queue.reap()
        assert (await queue.load(POOL))["normal"].queued == await queue.depth(POOL)

    in_queue(test)


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        (lambda queue, held: queue.complete(held, RESULT), "succeeded", ""),
        (lambda queue, held: queue.fail(held, BOOM, retry=False), "failed", BOOM.code),
        (lambda queue, held: queue.cancel(held.job_id), "canceled", ""),
    ],
)
def test_every_end_is_counted_once(in_queue, end, status, error):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        ended = counted(metrics.jobs_finished, POOL, status, error)
        fenced = counted(metrics.fenced_writes, POOL)
        for _ in range(2):
            await end(queue, held)
        assert (ended(), fenced()) == (1, 0)

    in_queue(test)


def test_a_lost_lease_and_what_comes_too_late_are_counted(in_queue, clock):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        reclaimed = counted(metrics.jobs_reclaimed, POOL)
        fenced = counted(metrics.fenced_writes, POOL)
        await queue.reap()  # the first look; a later gap would be an outage
        clock.advance(2.0)
        for _ in range(20):
            clock.advance(1.0)
            await queue.reap()
        assert reclaimed() == 1
        assert not await queue.complete(held, RESULT)
        assert fenced() == 1

    in_queue(test)


def test_dead_jobs_are_counted_by_pool(in_queue):
    async def test(queue):
        queue.max_attempts = 1
        for _ in range(2):
            await submit(queue)
            dead = counted(metrics.jobs_finished, POOL, "failed", BOOM.code)
            await queue.fail(await claim_one(queue), BOOM, retry=True)
            assert dead() == 1
        assert await queue.dead_by_pool() == {POOL: 2}

    in_queue(test)


def test_redis_says_whether_it_keeps_what_it_must(in_queue):
    async def test(queue):
        state = await queue.redis_state()
        assert state.persistence_ok
        assert (state.memory_ratio, state.outbox) == (0.0, 0)

    in_queue(test)
