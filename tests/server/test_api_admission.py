"""What the door says: idempotency keys, deadlines, caps, and readiness after a loss of data."""

import asyncio
from pathlib import Path

import pytest

from tests.server.fake_worker import running_worker, service

ASYNC = {"prefer": "respond-async"}


def test_a_key_replays_the_answer_and_refuses_another_body(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            key = {"idempotency_key": "order 7"}
            first = await it.generate({"prompt": "a red circle"}, **key)
            again = await it.generate({"prompt": "a red circle"}, **key)
            assert again.json() == first.json()
            other = await it.generate({"prompt": "a blue circle"}, **key)
            assert (other.status_code, other.json()["code"]) == (422, "idempotency-mismatch")
            fresh = await it.generate({"prompt": "a red circle"}, idempotency_key="order 8")
            assert fresh.json()["id"] != first.json()["id"]

    asyncio.run(scenario())


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there"])
def test_a_key_must_be_short_and_printable(redis_url: str, tmp_path: Path, key: str) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "x"}, idempotency_key=key)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
            assert "Idempotency-Key" in answer.json()["detail"]

    asyncio.run(scenario())


def test_a_deadline_that_passes_is_a_504(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "hang", "deadline_s": 0.5})
            assert (answer.status_code, answer.json()["code"]) == (504, "job-expired")
            job = await it.client.get(f"/jobs/{answer.json()['job']}")
            assert (job.json()["status"], job.json()["error"]["code"]) == ("expired", "deadline")

    asyncio.run(scenario())


@pytest.mark.parametrize("deadline_s", [0, -1, 1e9, "5"])
def test_a_deadline_has_limits(redis_url: str, tmp_path: Path, deadline_s: object) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "x", "deadline_s": deadline_s})
            assert answer.status_code == 422
            assert "deadline_s must be" in answer.json()["detail"]

    asyncio.run(scenario())


def test_a_tenants_excess_is_a_429_that_says_when_to_come_back(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        settings = {"tenant_limit": 2}
        async with service(redis_url, tmp_path, settings=settings) as it:
            for _ in range(2):
                assert (await it.generate({"prompt": "hang"}, **ASYNC)).status_code == 202
            refused = await it.generate({"prompt": "hang"}, **ASYNC)
            assert (refused.status_code, refused.json()["code"]) == (429, "too-many-jobs")
            assert 1 <= int(refused.headers["retry-after"]) <= 120

    asyncio.run(scenario())


def test_not_ready_after_a_flush_until_an_operator_accepts(redis_url: str, tmp_path: Path) -> None:
    """Row "FLUSHALL": an alarm, and work goes on once the loss is accepted."""

    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            queue = it.queue
            async with asyncio.timeout(20), running_worker(it.app.state.context.settings) as other:
                await queue.reap()
                await other.redis.flushall()
                while (answer := await it.client.get("/readyz")).status_code == 200:
                    await asyncio.sleep(0.05)
                assert answer.json()["code"] == "data-lost"
                await other.accept_epoch()
                while (await it.client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())
