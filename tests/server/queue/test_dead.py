"""Dead letters: kept a while, retried as new jobs, purged."""

from server.protocol import new_job_id
from server.queue import keys
from server.queue.dead import DeadLetters
from tests.server.queue.helpers import BOOM, RESULT, claim_one, pass_time, spec, submit


async def bury(queue, clock, **options):
    """A job that used up its attempts."""
    job_id = await submit(queue, **options)
    for _ in range(queue.max_attempts):
        await queue.fail(await claim_one(queue), BOOM, retry=True)
        await pass_time(queue, clock, 10)
    return job_id


def test_a_retry_is_a_new_job_that_names_the_old(in_queue, clock):
    async def test(queue):
        dead = DeadLetters(queue)
        old = await bury(queue, clock, tenant="t", priority="high", cost_ms=70)
        assert await dead.count() == 1
        assert [record.id for record in await dead.records()] == [old]
        new = await dead.retry(old)
        record = await queue.get(new)
        assert (record.status, record.retry_of, record.attempts) == ("queued", old, 0)
        assert (record.tenant, record.priority, record.spec) == ("t", "high", spec())
        assert (await queue.get(old)).status == "failed"  # one terminal status, ever
        assert await dead.count() == 0
        assert await dead.retry(old) is None
        held = await claim_one(queue)
        assert (held.job_id, held.cost_ms, held.solo) == (new, 70, False)
        assert await queue.complete(held, RESULT)

    in_queue(test)


def test_only_the_dead_are_retried_or_purged(in_queue, clock):
    async def test(queue):
        dead = DeadLetters(queue)
        alive, failed = await submit(queue), await submit(queue)
        await queue.claim("w1", "default", 1, 1e9)
        await queue.fail(await claim_one(queue), BOOM, retry=False)
        for job_id in (alive, failed, new_job_id(), "nonsense"):
            assert await dead.retry(job_id) is None
            assert await dead.purge(job_id) == 0
        assert await queue.get(alive) is not None

    in_queue(test)


def test_purged_jobs_are_forgotten(in_queue, clock):
    async def test(queue):
        dead = DeadLetters(queue)
        first, second = await bury(queue, clock), await bury(queue, clock)
        assert await dead.purge(first, first, "nonsense") == 1
        assert await queue.get(first) is None
        assert not await queue.redis.exists(keys.events(first))
        assert await dead.ids() == [second]

    in_queue(test)


def test_the_dead_are_bounded_in_number_and_time(in_queue, clock):
    async def test(queue):
        dead = DeadLetters(queue)
        old = await bury(queue, clock)
        crowd = {f"x{i}": clock() + i for i in range(keys.DEAD_LIMIT - 1)}
        await queue.redis.zadd(keys.DEAD, crowd)
        await bury(queue, clock)
        assert await dead.count() == keys.DEAD_LIMIT
        assert old not in await dead.ids(keys.DEAD_LIMIT)
        clock.advance(8 * 24 * 3600)
        await queue.reap()
        assert await dead.count() == 0

    in_queue(test)
