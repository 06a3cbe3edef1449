"""Offers and workers: who serves what, and who still takes work."""

import dataclasses

from server.protocol import ModelInfo
from server.queue import keys
from tests.fakes import FAKE_INFO
from tests.server.queue.helpers import POOL, claim_one, submit

OTHER = dataclasses.replace(FAKE_INFO, name="other", hash="1" * 64)


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


def test_a_draining_worker_keeps_its_leases_and_is_not_listed(in_queue, clock):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue, "w1")
        await queue.heartbeat("w1", POOL, [held])
        assert await queue.heartbeat("w1", POOL, [held], draining=True) == []
        assert await queue.workers() == []
        for _ in range(3):
            clock.advance(10)
            assert await queue.heartbeat("w1", POOL, [held], draining=True) == []
            assert await queue.reap() == 0
        assert await queue.workers() == []

    in_queue(test)


def test_a_lost_offer_is_put_up_again(in_queue):
    async def test(queue):
        await queue.publish_model(POOL, FAKE_INFO, "w1")
        assert not await queue.renew_model(POOL, FAKE_INFO, "w1")
        await queue.redis.flushall()
        assert await queue.renew_model(POOL, FAKE_INFO, "w1")
        assert await queue.model_info() == FAKE_INFO
        assert await queue.pools() == [POOL]

    in_queue(test)


def test_an_offer_whose_worker_is_gone_gives_way_to_one_that_serves(in_queue):
    async def test(queue):
        await queue.heartbeat("old", POOL, [])
        await queue.heartbeat("new", POOL, [])
        await queue.publish_model(POOL, FAKE_INFO, "old")
        await queue.publish_model(POOL, OTHER, "new")
        assert not await queue.renew_model(POOL, FAKE_INFO, "old")  # a rollout: the new one stands
        assert await queue.model_info() == OTHER
        await queue.sign_off("new", POOL)
        assert await queue.renew_model(POOL, FAKE_INFO, "old")
        assert await queue.model_info() == FAKE_INFO

    in_queue(test)


def test_an_offer_outlives_its_workers(in_queue):
    async def test(queue):
        await queue.publish_model(POOL, FAKE_INFO, "w1")
        await queue.sign_off("w1", POOL)
        assert await queue.model_info() == FAKE_INFO  # a pool may be scaled to nothing
        assert await queue.redis.ttl(keys.model(POOL)) == -1

    in_queue(test)
