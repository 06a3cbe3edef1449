"""A tenant's own jobs, and what they have used."""

import pytest
from redis import Redis

from server.errors import QuotaExceeded, TooManyJobs
from server.protocol import new_job_id
from server.queue import keys
from server.queue.submission import TenantLimits
from tests.server.queue.helpers import RESULT, claim_one, spec, submit


def test_jobs_are_listed_newest_first_in_pages(in_queue, clock):
    async def test(queue):
        ids = []
        for number in range(7):
            ids.append(await submit(queue))
            clock.advance(number % 2)  # some share a millisecond
        await submit(queue, tenant="other")
        seen, cursor = [], None
        for size in (3, 3, 1):
            page = await queue.list_jobs(limit=3, cursor=cursor)
            assert len(page.records) == size
            seen += [record.id for record in page.records]
            cursor = page.cursor
        assert cursor is None
        assert seen == ids[::-1]

    in_queue(test)


def test_a_listing_by_status_looks_past_the_others(in_queue, clock):
    async def test(queue):
        done = []
        for _ in range(3):
            await submit(queue)
            held = await claim_one(queue)
            await queue.complete(held, RESULT)
            done.append(held.job_id)
        for _ in range(150):
            await submit(queue)
        page = await queue.list_jobs(status="succeeded", limit=10)
        assert {record.id for record in page.records} == set(done)
        assert page.cursor is None

    in_queue(test)


@pytest.mark.parametrize("cursor", ["", "x", "1-2", "-5", "9" * 99])
def test_a_made_up_cursor_is_no_error(in_queue, cursor):
    async def test(queue):
        await submit(queue)
        assert len((await queue.list_jobs(cursor=cursor)).records) == 1

    in_queue(test)


def test_a_list_forgets_old_jobs_and_keeps_open_ones(in_queue, clock, redis_url):
    async def test(queue):
        still_open = await submit(queue)
        for _ in range(5):
            await queue.cancel(await submit(queue))
        clock.advance(24 * 3600 + 1)
        latest = await submit(queue)
        listed = await queue.redis.zrange(keys.listed("anonymous"), 0, -1)
        assert listed == [still_open, latest]

    in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert client.ttl(keys.listed("anonymous")) > 0


def test_usage_is_counted_by_day(in_queue, clock, redis_url):
    async def test(queue):
        clock.ms = 20_000 * keys.DAY_MS
        await submit(queue, tenant="a", cost_ms=300)
        await submit(queue, tenant="a", cost_ms=500)
        await submit(queue, tenant="b", cost_ms=7)
        usage = await queue.usage("a")
        assert (usage.jobs, usage.cost_ms) == (2, 800)
        clock.advance(24 * 3600)
        assert (await queue.usage("a")).jobs == 0

    in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert 0 < client.ttl(keys.usage("a", 20_000)) <= 2 * 24 * 3600


def test_a_tenants_own_limits_are_kept_in_the_same_transition(in_queue, clock):
    async def test(queue):
        clock.ms = 20_000 * keys.DAY_MS + 23 * 3600 * 1000
        limits = TenantLimits(open_jobs=2, daily_jobs=3)
        for _ in range(2):
            await submit(queue, limits=limits)
        with pytest.raises(TooManyJobs, match="2 jobs that have not ended"):
            await submit(queue, limits=limits)
        await queue.complete(await claim_one(queue), RESULT)
        await submit(queue, limits=limits)
        await queue.complete(await claim_one(queue), RESULT)
        with pytest.raises(QuotaExceeded, match="3 jobs today") as refusal:
            await queue.submit(new_job_id(), spec(), limits=limits)
        assert refusal.value.retry_after_s == 3600
        clock.advance(3601)
        await submit(queue, limits=limits)

    in_queue(test)
