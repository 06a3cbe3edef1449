"""`GET /state`: workers, running and waiting jobs of every pool."""

import asyncio
from pathlib import Path

from server.protocol import DEFAULT_POOL
from tests.server.fake_worker import MODEL, service


def test_nothing_is_known_before_a_worker(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            answer = await it.client.get("/state")
            assert (answer.status_code, answer.json()) == (200, {"pools": []})
            assert answer.headers["cache-control"] == "no-store"

    asyncio.run(scenario())


def test_jobs_are_counted_while_they_wait(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False, settings={"queue_limit": 7}) as it:
            await it.queue.publish_model(DEFAULT_POOL, MODEL)
            for _ in range(3):
                body = {"prompt": "x", "num_inference_steps": 50}
                await it.generate(body, prefer="respond-async")
            (pool,) = (await it.client.get("/state")).json()["pools"]
            assert pool == {
                "pool": DEFAULT_POOL, "model": "demo", "hash": "0" * 64, "workers": 0,
                "running": 0, "queued": 3, "queue_limit": 7, "work_s": None,
            }  # fmt: skip
            # A worker of the default 10 ms a step: three jobs of 50 steps are 1.5 s of work.
            await it.queue.heartbeat("w", DEFAULT_POOL, [])
            (pool,) = (await it.client.get("/state")).json()["pools"]
            assert (pool["workers"], pool["running"], pool["work_s"]) == (1, 0, 1.5)
            claims = await it.queue.claim("w", DEFAULT_POOL, 1, 1e12)
            await it.queue.heartbeat("w", DEFAULT_POOL, claims)
            (pool,) = (await it.client.get("/state")).json()["pools"]
            assert (pool["queued"], pool["running"], pool["work_s"]) == (2, 1, 1.0)

    asyncio.run(scenario())
