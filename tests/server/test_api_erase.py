"""DELETE /jobs/{id} leaves nothing of what was asked or drawn; GET /jobs lists the caller's own."""

import asyncio
import re
from pathlib import Path

import pytest

from server.protocol import JobSpec, new_job_id
from server.queue.blobs import BlobStore, StoredClaim
from server.queue.dead import DeadLetters
from tests.server.fake_worker import Service, service, service_settings

SECRET = "my secret wish"
ASYNC = {"prefer": "respond-async"}


async def everything_in_redis(it: Service) -> str:
    """All that Redis holds, as text."""
    redis, text = it.queue.redis, ""
    for key in await redis.keys("*"):
        kind = await redis.type(key)
        if kind == "hash":
            text += f"{key} {await redis.hgetall(key)}\n"
        elif kind == "string":
            text += f"{key} {await redis.get(key)}\n"
        elif kind == "stream":
            text += f"{key} {await redis.xrange(key)}\n"
        else:
            text += f"{key}\n"
    return text


def test_erasing_a_finished_job_removes_words_and_pictures(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            body = {
                "prompt": SECRET, "negative_prompt": f"not {SECRET}", "num_images": 2, "seed": 4,
                "system_prompt": f"of {SECRET}", "metadata": {"note": SECRET},
            }  # fmt: skip
            keyed = await it.generate(body, idempotency_key="k")
            job = keyed.json()
            kept = (await it.generate({"prompt": "another"})).json()
            assert SECRET in await everything_in_redis(it)
            assert len(list(tmp_path.rglob("*.png"))) == 3
            answers = [await it.client.delete(f"/jobs/{job['id']}") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert answers[0].json() == answers[1].json()
            left = answers[0].json()
            assert (left["status"], left["images"], left["metadata"]) == ("succeeded", [], None)
            assert left["timings"] == job["timings"]
            assert SECRET not in await everything_in_redis(it)
            assert len(list(tmp_path.rglob("*.png"))) == 1
            assert (await it.client.get(f"/jobs/{job['id']}")).json() == left
            for image in job["images"]:
                assert (await it.client.get(image["url"])).status_code == 404
            assert (await it.client.get(kept["images"][0]["url"])).status_code == 200
            # The key still stands for that job, whatever is left of it.
            again = await it.generate(body, idempotency_key="k")
            assert (again.status_code, again.json()["id"]) == (200, job["id"])

    asyncio.run(scenario())


def test_a_key_of_an_erased_job_has_no_picture_to_give(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            headers = {"accept": "image/png", "idempotency_key": "k"}
            first = await it.generate({"prompt": "x"}, **headers)
            await it.client.delete(f"/jobs/{first.headers['x-job-id']}")
            again = await it.generate({"prompt": "x"}, **headers)
            assert (again.status_code, again.json()["code"]) == (404, "not-found")

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["queued", "running"])
def test_erasing_an_open_job_cancels_it(redis_url: str, tmp_path: Path, when: str) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": f"hang on, {SECRET}"}, **ASYNC)).json()
            await it.until(job["id"], "running")
            if when == "queued":
                job = (await it.generate({"prompt": SECRET}, **ASYNC)).json()
            erased = await it.client.delete(f"/jobs/{job['id']}")
            assert (erased.status_code, erased.json()["status"]) == (200, "canceled")
            record = await it.queue.get(job["id"])
            assert record is not None
            assert record.spec.prompt == ""
            assert (record.started_ms is None) == (when == "queued")
            after = await it.generate({"prompt": "next"}, prefer="wait=1")
            assert after.status_code == (200 if when == "running" else 202)

    asyncio.run(scenario())


def test_a_dead_jobs_reason_goes_too_and_nobody_repeats_it(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, settings={"max_attempts": 1}) as it:
            failed = await it.generate({"prompt": "fail"})
            job_id = failed.json()["job"]
            await it.queue.redis.zadd("{lumina}:dead", {job_id: 1})
            erased = (await it.client.delete(f"/jobs/{job_id}")).json()
            assert erased["status"] == "failed"
            assert erased["error"]["code"] == "broken"
            assert "It broke" not in erased["error"]["detail"]
            assert await DeadLetters(it.queue).retry(job_id) is None

    asyncio.run(scenario())


def test_nobody_erases_what_is_anothers(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            other = new_job_id()
            await it.queue.submit(other, JobSpec(prompt=SECRET, seed=1), tenant="somebody")
            for job_id in (other, new_job_id(), "0", "%2e%2e"):
                assert (await it.client.delete(f"/jobs/{job_id}")).status_code == 404
            record = await it.queue.get(other)
            assert record is not None
            assert (record.status, record.spec.prompt) == ("queued", SECRET)

    asyncio.run(scenario())


def test_a_store_that_fails_is_told_and_asking_again_helps(redis_url: str, tmp_path: Path) -> None:
    class Stuck(BlobStore):
        stuck = True

        def remove_claim(self, claim: StoredClaim) -> None:
            if self.stuck:
                raise PermissionError("read only")
            super().remove_claim(claim)

    async def scenario() -> None:
        blobs = Stuck(service_settings(redis_url, tmp_path).blob_store_url)
        async with service(redis_url, tmp_path, blobs=blobs) as it:
            job = (await it.generate({"prompt": SECRET})).json()
            answer = await it.client.delete(f"/jobs/{job['id']}")
            assert (answer.status_code, answer.json()["code"]) == (503, "storage-unavailable")
            assert (await it.client.get(job["images"][0]["url"])).status_code == 200
            blobs.stuck = False
            assert (await it.client.delete(f"/jobs/{job['id']}")).status_code == 200
            assert SECRET not in await everything_in_redis(it)
            assert not list(tmp_path.rglob("*.png"))

    asyncio.run(scenario())


def test_the_list_is_the_callers_own_newest_first(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            mine = [
                (await it.generate({"prompt": "fail" if k % 3 == 0 else "x"}, **ASYNC)).json()["id"]
                for k in range(7)
            ]
            for job_id in mine:
                await it.until(job_id, "succeeded", "failed")
            other = JobSpec(prompt="x", seed=1)
            await it.queue.submit(new_job_id(), other, tenant="somebody", pool="elsewhere")
            whole = await it.client.get("/jobs")
            assert [job["id"] for job in whole.json()["jobs"]] == mine[::-1]
            assert "link" not in whole.headers
            job = (await it.client.get(f"/jobs/{mine[0]}")).json()
            assert whole.json()["jobs"][-1] == job

            found: list[str] = []
            path: str | None = "/jobs?limit=3&status=succeeded"
            while path:
                answer = await it.client.get(path)
                found += [job["id"] for job in answer.json()["jobs"]]
                link = re.fullmatch(r'<(.+)>; rel="next"', answer.headers.get("link", ""))
                path = link[1] if link else None
            assert found == [job_id for k, job_id in enumerate(mine) if k % 3][::-1]
            failed = (await it.client.get("/jobs?status=failed")).json()["jobs"]
            assert [job["id"] for job in failed] == mine[::3][::-1]
            assert (await it.client.get("/jobs?status=running")).json() == {"jobs": []}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("limit=0", 'limit must be at least 1, got "0"'),
        ("limit=101", 'limit must be at most 100, got "101"'),
        ("limit=ten", 'limit must be a whole number, got "ten"'),
        ("status=done", "status must be 'queued', 'running', 'succeeded', 'failed', 'canceled' or"),
        ("cursor=-1", 'cursor must be one of an earlier answer, got "-1"'),
        ("cursor=%00", "cursor must be one of an earlier answer"),
        ("cursor=1e3", "cursor must be one of an earlier answer"),
        ("cursor=1%0a", "cursor must be one of an earlier answer"),
    ],
)  # fmt: skip
def test_a_list_is_asked_for_in_its_own_words(
    redis_url: str, tmp_path: Path, query: str, words: str
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            answer = await it.client.get(f"/jobs?{query}")
            assert answer.status_code == 422
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json()
            assert problem["code"] == "invalid-request"
            assert problem["errors"][0]["field"] == words.split()[0]
            assert problem["detail"].startswith(words)
            assert "\n" not in problem["detail"]

    asyncio.run(scenario())
