"""Claims: order, room, fairness between priorities and tenants, solo jobs."""

import asyncio
from collections import Counter

import pytest

from server.errors import QueueUnavailable
from server.queue import keys
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.queue.submission import TenantLimits
from tests.server.queue.helpers import claim, claim_one, submit


def test_claims_are_oldest_first_and_bounded(in_queue):
    async def test(queue):
        ids = [await submit(queue, cost_ms=100) for _ in range(5)]
        assert [c.job_id for c in await claim(queue, max_jobs=2)] == ids[:2]
        assert [c.job_id for c in await claim(queue, max_cost=250, max_jobs=9)] == ids[2:4]
        assert await claim(queue, max_cost=50, idle=False) == []
        assert [c.job_id for c in await claim(queue, max_cost=50, idle=True)] == ids[4:]

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


@pytest.mark.parametrize("quiet", ["a-quiet-one", "z-quiet-one"])
def test_a_crowd_does_not_hold_up_a_quiet_tenant(in_queue, quiet):
    """Who joins comes next: it waits for the job under way only, whatever its name."""

    async def test(queue):
        for _ in range(20):
            await submit(queue, tenant="noisy", cost_ms=10)
        for _ in range(4):
            await claim_one(queue)
            await submit(queue, tenant=quiet, cost_ms=10)
            assert [(await claim_one(queue)).tenant for _ in range(2)] == [quiet, "noisy"]

    in_queue(test)


def test_those_who_join_are_served_in_their_order_and_no_newcomer_overtakes(in_queue):
    async def test(queue):
        for _ in range(9):
            await submit(queue, tenant="noisy", cost_ms=10)
        await claim_one(queue)
        names = [f"{letter}-quiet" for letter in "zyxcba"]
        for name in names[:3]:
            await submit(queue, tenant=name, cost_ms=10)
        order = []
        for name in names[3:]:  # one more joins whenever one was served
            order.append((await claim_one(queue)).tenant)
            await submit(queue, tenant=name, cost_ms=10)
        order += [(await claim_one(queue)).tenant for _ in range(3)]
        assert order == names

    in_queue(test)


def test_costly_jobs_count_for_more(in_queue):
    async def test(queue):
        for _ in range(40):
            await submit(queue, tenant="large", cost_ms=300)
            await submit(queue, tenant="small", cost_ms=100)
        shares = Counter([(await claim_one(queue)).tenant for _ in range(40)])
        assert shares == pytest.approx({"small": 30, "large": 10}, abs=1)

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


def test_a_bad_spec_never_costs_the_claims_beside_it(redis_url, clock):
    class Unlucky(JobQueue):
        async def _fail(self, *_args, **_options):
            raise QueueUnavailable("away")

    async def test():
        queue = Unlucky(connect(redis_url), clock_ms=clock)
        try:
            bad = await submit(queue)
            await queue.redis.hset(keys.job(bad), "spec", "{")
            good = await submit(queue)
            assert [c.job_id for c in await claim(queue, max_jobs=5)] == [good]
            assert await queue.redis.zscore(keys.LEASE, bad) is not None  # the reaper's, later
        finally:
            await queue.close()

    asyncio.run(test())


def test_a_pool_sees_its_own_jobs_only(in_queue):
    async def test(queue):
        other = await submit(queue, pool="other")
        mine = await submit(queue)
        assert [c.job_id for c in await claim(queue, max_jobs=9)] == [mine]
        assert [c.job_id for c in await queue.claim("w2", "other", 9, 1e9)] == [other]

    in_queue(test)


def test_a_job_whose_record_is_gone_stops_nobody(in_queue, clock):
    """As an evicting Redis leaves behind, against which the preflight warns."""

    async def test(queue):
        gone, alone = await submit(queue), await submit(queue)
        await queue.redis.delete(keys.job(gone))
        assert (await claim_one(queue)).job_id == alone
        clock.advance(16)
        await queue.reap()
        await queue.redis.delete(keys.job(alone))  # now among the solo ones
        fine = await submit(queue)
        assert (await claim_one(queue)).job_id == fine

    in_queue(test)


def test_a_tenant_of_more_weight_gets_that_much_more(in_queue):
    async def test(queue):
        for tenant, weight in (("light", 1), ("heavy", 3)):
            for _ in range(12):
                await submit(queue, tenant=tenant, limits=TenantLimits(weight=weight))
        order = [(await claim_one(queue)).tenant for _ in range(12)]
        assert order.count("heavy") == 9

    in_queue(test)
