"""The outbox: every end of a job that has a webhook is told, by somebody, for a day."""

import pytest
from redis import Redis

from server.protocol import new_job_id
from server.queue import keys
from server.queue.dead import DeadLetters
from server.queue.submission import Webhook
from tests.server.queue.helpers import BOOM, RESULT, claim_one, pass_time, spec, submit

URL = "https://example.org/hook"


async def with_webhook(queue, **options):
    job_id = new_job_id()
    await queue.submit(job_id, spec(), webhook=Webhook(URL), **options)
    return job_id


@pytest.mark.parametrize("status", ["succeeded", "failed", "canceled", "expired"])
def test_every_end_leaves_one_delivery(in_queue, clock, status, redis_url):
    async def test(queue):
        job_id = await with_webhook(queue, deadline_s=100.0)
        held = await claim_one(queue)
        assert await queue.num_deliveries() == 0
        if status == "succeeded":
            await queue.complete(held, RESULT)
        elif status == "failed":
            await queue.fail(held, BOOM, retry=False)
        elif status == "canceled":
            await queue.cancel(job_id)
        else:
            clock.advance(101)
            await queue.reap()
        clock.advance(2)
        (delivery,) = await queue.take_deliveries()
        assert (delivery.job_id, delivery.url, delivery.status) == (job_id, URL, status)
        assert (delivery.tries, delivery.age_s) == (1, 2.0)
        return job_id

    job_id = in_queue(test)
    with Redis.from_url(redis_url) as client:
        assert 0 < client.ttl(keys.delivery(job_id)) <= 24 * 3600


def test_a_job_without_a_webhook_leaves_none(in_queue):
    async def test(queue):
        await queue.cancel(await submit(queue))
        assert await queue.num_deliveries() == 0

    in_queue(test)


def test_a_delivery_has_one_deliverer_and_comes_back_if_that_dies(in_queue, clock):
    async def test(queue):
        await queue.cancel(await with_webhook(queue))
        (first,) = await queue.take_deliveries(lease_s=30)
        assert await queue.take_deliveries() == []
        clock.advance(31)
        (second,) = await queue.take_deliveries()
        assert second.tries == 2
        assert not await queue.settle_delivery(first, None)  # late, and overtaken
        assert await queue.settle_delivery(second, None)
        assert await queue.num_deliveries() == 0

    in_queue(test)


def test_a_failed_delivery_waits_for_its_next_try(in_queue, clock):
    async def test(queue):
        await queue.cancel(await with_webhook(queue))
        (delivery,) = await queue.take_deliveries()
        assert await queue.settle_delivery(delivery, 300.0)
        clock.advance(299)
        assert await queue.take_deliveries() == []
        clock.advance(2)
        assert (await queue.take_deliveries())[0].tries == 2

    in_queue(test)


def test_after_a_day_nobody_tries(in_queue, clock):
    async def test(queue):
        job_id = await with_webhook(queue)
        await queue.cancel(job_id)
        await queue.redis.delete(keys.delivery(job_id))  # its time to live has ended
        assert await queue.take_deliveries() == []
        assert await queue.num_deliveries() == 0

    in_queue(test)


def test_the_job_that_repeats_a_dead_one_tells_its_webhook_too(in_queue, clock):
    async def test(queue):
        job_id = await with_webhook(queue)
        await claim_one(queue)
        await pass_time(queue, clock, 16)
        (delivery,) = await queue.take_deliveries()
        await queue.settle_delivery(delivery, None)
        again = await DeadLetters(queue).retry(job_id)
        await queue.complete(await claim_one(queue), RESULT)
        (delivery,) = await queue.take_deliveries()
        assert (delivery.job_id, delivery.status) == (again, "succeeded")

    in_queue(test, max_attempts=1)
