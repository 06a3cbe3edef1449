"""Synchronous calls: keys that replay and attach, clients that leave, waits that end."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.server.fake_worker import Service, running_worker, service
from tests.server.live import live_service

ASYNC = {"prefer": "respond-async"}
KEY = {"idempotency_key": "mine"}


async def num_jobs(it: Service) -> int:
    return len(await it.queue.redis.keys("{lumina}:job:*"))


async def until_running(it: Service, count: int = 1) -> str:
    """The id of the newest job that runs."""
    async with asyncio.timeout(20):
        while True:
            jobs = (await it.client.get("/jobs?status=running")).json()["jobs"]
            if len(jobs) >= count:
                return str(jobs[0]["id"])
            await asyncio.sleep(0.01)


def test_a_key_attaches_to_the_running_job(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            body = {"prompt": "hang"}
            first = asyncio.create_task(it.generate(body, **KEY))
            job_id = await until_running(it)
            second = asyncio.create_task(it.generate(body, **KEY))
            at_once = await it.generate(body, **KEY, **ASYNC)
            assert (at_once.status_code, at_once.json()["id"]) == (202, job_id)
            short = await it.generate(body, **KEY, prefer="wait=1")
            assert (short.status_code, short.json()["id"]) == (202, job_id)
            await it.client.post(f"/jobs/{job_id}/cancel")
            answers = [await first, await second]
            assert [answer.status_code for answer in answers] == [409, 409]
            assert {answer.json()["job"] for answer in answers} == {job_id}
            assert await num_jobs(it) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "status"), [("x", 200), ("fail", 500), ("hang", 504)], ids=["done", "failed", "late"]
)
def test_a_key_replays_the_final_answer(
    redis_url: str, tmp_path: Path, prompt: str, status: int
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            body: dict[str, object] = {"prompt": prompt}
            if status == 504:
                body["deadline_s"] = 0.5
            answers = [await it.generate(body, **KEY) for _ in range(3)]
            answers.append(await it.generate(body, **KEY, **ASYNC))  # it has ended: no 202
            assert [answer.status_code for answer in answers] == [status] * 4
            bodies = [answer.json() | {"request_id": None} for answer in answers]
            assert bodies == bodies[:1] * 4
            assert await num_jobs(it) == 1

    asyncio.run(scenario())


def test_a_key_replays_pictures_in_their_format(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            png = [await it.generate({"prompt": "x"}, accept="image/png", **KEY) for _ in range(2)]
            assert png[0].content == png[1].content
            assert png[0].headers["etag"] == png[1].headers["etag"]
            other = await it.generate({"prompt": "x"}, accept="image/webp", **KEY)
            assert (other.status_code, other.json()["code"]) == (422, "idempotency-mismatch")
            as_json = await it.generate({"prompt": "x"}, **KEY)  # the same picture, told of
            assert as_json.json()["id"] == png[0].headers["x-job-id"]

    asyncio.run(scenario())


def test_refusals_are_never_replayed(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            assert (await it.generate({"prompt": "x"}, **KEY)).status_code == 503  # no model yet
            async with running_worker(it.app.state.context.settings):
                assert (await it.generate({"prompt": "x"}, **KEY)).status_code == 200
        async with service(redis_url, tmp_path, settings={"tenant_limit": 1}) as it:
            blocker = (await it.generate({"prompt": "hang"}, **ASYNC)).json()["id"]
            refused = await it.generate({"prompt": "y"}, idempotency_key="two")
            assert refused.status_code == 429
            await it.client.post(f"/jobs/{blocker}/cancel")
            assert (await it.generate({"prompt": "y"}, idempotency_key="two")).status_code == 200

    asyncio.run(scenario())


def test_out_of_memory_is_tried_again_under_the_same_key(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            body = {"prompt": "fail out-of-memory"}
            ids = set()
            for tries in (1, 2):
                answer = await it.generate(body, **KEY)
                assert (answer.status_code, answer.json()["code"]) == (503, "out-of-memory")
                ids.add(answer.json()["job"])
                assert len(ids) == tries
            other = await it.generate({"prompt": "x"}, **KEY)
            assert other.status_code == 200  # nothing stands for the key

    asyncio.run(scenario())


async def ask_and_leave(it: Service, headers: str) -> None:
    """Ask for a picture over a connection of our own, and hang up once its job runs."""
    url = it.client.base_url
    _, writer = await asyncio.open_connection(url.host, url.port)
    body = json.dumps({"prompt": "hang"}).encode()
    writer.write(
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()
    await until_running(it)
    writer.close()
    await writer.wait_closed()


def test_who_leaves_cancels_unless_there_is_a_key(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            await ask_and_leave(it, "Idempotency-Key: mine\r\n")
            kept = await until_running(it)
            await asyncio.sleep(0.5)
            again = await it.generate({"prompt": "hang"}, **KEY, **ASYNC)
            assert (again.json()["id"], again.json()["status"]) == (kept, "running")
            await it.client.post(f"/jobs/{kept}/cancel")
            await ask_and_leave(it, "")
            newest = (await it.client.get("/jobs")).json()["jobs"][0]["id"]
            assert newest != kept
            await it.until(newest, "canceled")

    asyncio.run(scenario())


def test_a_202_says_where_to_go_and_the_job_goes_on(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, settings={"sync_timeout": 0.3}) as it:
            body = {"prompt": "hang"}
            for headers, applied in [({}, None), ({"prefer": "wait=0"}, "wait=0")]:
                answer = await it.generate(body, **headers)
                assert answer.status_code == 202
                assert answer.headers.get("preference-applied") == applied
                assert answer.headers["location"] == f"/jobs/{answer.json()['id']}"
                job = (await it.client.get(answer.headers["location"])).json()
                assert job["status"] in ("queued", "running")
                await it.client.delete(answer.headers["location"])

    asyncio.run(scenario())


def test_a_service_that_stops_lets_waiting_openai_clients_come_back(
    redis_url: str, tmp_path: Path
) -> None:
    """A rolling update must not look like a picture that takes too long: clients try again."""

    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            asked = it.client.post("/v1/images/generations", json={"prompt": "hang"})
            waiting = asyncio.create_task(asked)
            while not await it.queue.redis.zcard("{lumina}:lease"):
                await asyncio.sleep(0.01)
            it.app.state.context.stopping.set()
            answer = await asyncio.wait_for(waiting, 10)
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert (error["code"], "stops" in error["message"]) == ("queue_unavailable", True)
            assert "retry-after" in answer.headers
            assert "x-should-retry" not in answer.headers
            (job,) = (await it.client.get("/jobs")).json()["jobs"]
            await it.until(job["id"], "canceled")

    asyncio.run(scenario())
