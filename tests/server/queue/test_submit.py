"""Submission: admission, deadlines at the door, idempotency."""

import pytest

from server.errors import (
    DeadlineTooShort,
    IdempotencyMismatch,
    InvalidRequest,
    NotFound,
    QueueFull,
    TooManyJobs,
)
from server.protocol import new_job_id
from server.queue import keys
from server.queue.jobs import Idempotency
from tests.server.queue.helpers import POOL, RESULT, claim_one, spec, submit


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


def test_a_tenants_own_excess_is_refused_and_no_other_tenants(in_queue):
    async def test(queue):
        first = await submit(queue, tenant="noisy")
        await submit(queue, tenant="noisy")
        with pytest.raises(TooManyJobs, match="2 jobs that have not ended"):
            await submit(queue, tenant="noisy")
        await submit(queue, tenant="quiet")
        held = await claim_one(queue)
        with pytest.raises(TooManyJobs):  # a running job counts too
            await submit(queue, tenant="noisy")
        assert held.job_id == first
        await queue.complete(held, RESULT)
        await submit(queue, tenant="noisy")

    in_queue(test, tenant_limit=2)


def test_refusals_say_when_a_tenth_of_the_work_is_done(in_queue):
    async def test(queue):
        for _ in range(4):
            await submit(queue, cost_ms=30_000)
        with pytest.raises(QueueFull) as alone:
            await submit(queue)
        await queue.heartbeat("w1", POOL, [])
        await queue.heartbeat("w2", POOL, [])
        with pytest.raises(QueueFull) as shared:
            await submit(queue)
        assert (alone.value.retry_after_s, shared.value.retry_after_s) == (12.0, 6.0)

    in_queue(test, queue_limit=4)


def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_the_door(in_queue):
    async def test(queue):
        for _ in range(10):
            await submit(queue, cost_ms=6_000)
        said = r"estimated wait is 60\.0 s, and the job then takes about 1\.0 s"
        with pytest.raises(DeadlineTooShort, match=said):
            await submit(queue, cost_ms=1_000, deadline_s=60)
        await submit(queue, cost_ms=1_000, deadline_s=61)
        await queue.heartbeat("w1", POOL, [])
        await queue.heartbeat("w2", POOL, [])
        await submit(queue, cost_ms=1_000, deadline_s=32)  # two workers share the work

    in_queue(test)


def test_a_high_priority_job_waits_for_its_share_only(in_queue):
    async def test(queue):
        for _ in range(10):
            await submit(queue, cost_ms=6_000, priority="low")
        await submit(queue, cost_ms=1_000, priority="high", deadline_s=1)
        # The class has 16 of 17 parts of the device: a second of work takes 17/16 s.
        with pytest.raises(DeadlineTooShort, match=r"estimated wait is 1\.1 s"):
            await submit(queue, cost_ms=1_000, priority="high", deadline_s=2)
        await submit(queue, cost_ms=1_000, priority="high", deadline_s=2.1)

    in_queue(test)


@pytest.mark.parametrize("deadline_s", [0, -1, 0.0001])
def test_a_deadline_lies_in_the_future(in_queue, deadline_s):
    async def test(queue):
        with pytest.raises(InvalidRequest, match="deadline_s"):
            await submit(queue, deadline_s=deadline_s)

    in_queue(test)


def test_the_work_that_waits_is_the_sum_of_costs(in_queue, clock):
    async def test(queue):
        a, b = await submit(queue, cost_ms=5), await submit(queue, cost_ms=7)
        await submit(queue, cost_ms=11, priority="low", pool="other")
        assert await queue.redis.hgetall(keys.work(POOL)) == {"normal": "12"}
        await queue.cancel(b)
        held = await claim_one(queue)
        assert held.job_id == a
        assert await queue.redis.hgetall(keys.work(POOL)) == {}
        await queue.release(held)
        assert await queue.redis.hgetall(keys.work(POOL)) == {"normal": "5"}
        assert await queue.redis.hgetall(keys.work("other")) == {"low": "11"}

    in_queue(test)


def test_an_idempotency_key_gives_the_job_of_the_first_time(in_queue):
    async def test(queue):
        key = Idempotency("k", "body")
        first = await submit(queue, idempotency=key)
        assert await submit(queue, idempotency=key) == first
        await queue.complete(await claim_one(queue), RESULT)
        again = await queue.submit(new_job_id(), spec(), idempotency=key)
        assert (again.id, again.status) == (first, "succeeded")
        assert await submit(queue, idempotency=key, tenant="other") != first
        with pytest.raises(IdempotencyMismatch, match="another body"):
            await submit(queue, idempotency=Idempotency("k", "other body"))
        assert await queue.depth() == 1

    in_queue(test)


def test_a_refusal_uses_up_no_key(in_queue):
    async def test(queue):
        await submit(queue)
        key = Idempotency("k", "body")
        with pytest.raises(QueueFull):
            await submit(queue, idempotency=key)
        await claim_one(queue)
        await submit(queue, idempotency=key)

    in_queue(test, queue_limit=1)


def test_a_key_lives_a_day(in_queue):
    async def test(queue):
        await submit(queue, idempotency=Idempotency("k", "body"))
        (key,) = await queue.redis.keys(f"{keys.PREFIX}idem:*")
        assert key == f"{keys.PREFIX}idem:anonymous:k"
        assert 24 * 3600 - 5 <= await queue.redis.ttl(key) <= 24 * 3600

    in_queue(test)


def test_the_answer_to_a_submission_is_the_jobs_record(in_queue, clock):
    async def test(queue):
        for deadline_s in (None, 60.0):
            job_id = new_job_id()
            options = {"tenant": "t", "priority": "high", "deadline_s": deadline_s}
            record = await queue.submit(job_id, spec("a", width=64), **options)
            assert record == await queue.get(job_id)

    in_queue(test)
