"""POST /generate from HTTP through a real Redis to a picture, and every way it can end."""

import asyncio
import hashlib
import io
from pathlib import Path

import pytest
from PIL import Image

from server.api.schemas import MAX_SEED
from tests.server.fake_worker import service


def test_waits_for_the_picture(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "a red circle", "seed": 7, "width": 64})
            assert answer.status_code == 200
            job = answer.json()
            assert job["status"] == "succeeded"
            assert job["error"] is None
            assert job["model"] == "demo"
            assert job["seed"] == 7
            assert job["expires_at"].endswith("Z")
            assert set(job["timings"]) == {
                "queue_s", "encode_s", "denoise_s", "decode_s", "store_s", "total_s",
            }  # fmt: skip
            assert job["steps"] == {"computed": 20, "skipped": 0, "cfg": 20, "nfe": 40}
            assert job["prompt_tokens"] == 3
            (image,) = job["images"]
            assert (image["width"], image["height"], image["seed"]) == (64, 128, 7)

            data = await it.client.get(image["url"])
            assert data.headers["content-type"] == "image/png"
            assert hashlib.sha256(data.content).hexdigest() == image["sha256"]
            assert (await it.client.get(f"/jobs/{job['id']}")).json() == job

    asyncio.run(scenario())


def test_respond_async_answers_at_once_and_is_followed(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "hang"}, prefer="respond-async")
            assert answer.status_code == 202
            assert answer.headers["preference-applied"] == "respond-async"
            job = answer.json()
            assert job["status"] in {"queued", "running"}
            assert answer.headers["location"] == f"/jobs/{job['id']}"
            assert (await it.until(job["id"], "running"))["attempt"] == 1

            behind = (await it.generate({"prompt": "next"}, prefer="respond-async")).json()
            assert behind["position"] == 1
            assert behind["estimated_start"] >= behind["submitted_at"]
            last = (await it.generate({"prompt": "later"}, prefer="respond-async")).json()
            assert (last["position"], job["estimated_start"] is None) == (
                2,
                job["position"] is None,
            )
            assert last["estimated_start"] > behind["estimated_start"]
            canceled = await it.client.post(f"/jobs/{job['id']}/cancel")
            assert canceled.json()["status"] == "canceled"
            done = await it.until(behind["id"], "succeeded")
            assert done["step"] == done["total"] == 20
            assert done["estimated_start"] is None

    asyncio.run(scenario())


@pytest.mark.parametrize("prefer", ["wait=1", "respond-async, wait=1", 'Wait="1"; x=y'])
def test_wait_is_bounded_by_prefer(redis_url: str, tmp_path: Path, prefer: str) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "hang"}, prefer=prefer)
            assert answer.status_code == 202
            assert answer.headers["preference-applied"] == "wait=1"
            assert answer.json()["status"] == "running"
            quick = await it.client.post(f"/jobs/{answer.json()['id']}/cancel")
            assert quick.status_code == 200
            assert (await it.generate({"prompt": "quick"}, prefer=prefer)).status_code == 200

    asyncio.run(scenario())


def test_wait_is_bounded_by_the_setting(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, settings={"sync_timeout": 0.2}) as it:
            for headers in ({}, {"prefer": "wait=100"}, {"prefer": "wait=-1"}):
                answer = await it.generate({"prompt": "hang"}, **headers)
                assert answer.status_code == 202

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_accept_gets_the_bytes(redis_url: str, tmp_path: Path, name: str) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "x", "seed": 3}, accept=f"image/{name}")
            assert answer.status_code == 200
            assert answer.headers["content-type"] == f"image/{name}"
            assert answer.headers["x-seed"] == "3"
            assert Image.open(io.BytesIO(answer.content)).format == name.upper()
            job = (await it.client.get(f"/jobs/{answer.headers['x-job-id']}")).json()
            assert answer.headers["etag"] == f'"{job["images"][0]["sha256"]}"'

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "application/json"),
        ("text/html", "application/json"),
        ("application/json, image/png;q=0.5", "application/json"),
        ("image/jpeg;q=0.5, image/webp;q=0.9", "image/webp"),
        ("image/png;q=0", "application/json"),
    ],
)
def test_accept_by_weight(redis_url: str, tmp_path: Path, accept: str, media: str) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": "x"}, accept=accept)
            assert answer.headers["content-type"] == media

    asyncio.run(scenario())


def test_accept_that_contradicts_the_body(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            two = await it.generate({"prompt": "x", "num_images": 2}, accept="image/png")
            assert (two.status_code, two.json()["errors"][0]["field"]) == (422, "num_images")
            other = await it.generate({"prompt": "x", "output_format": "webp"}, accept="image/png")
            assert other.json()["errors"][0]["field"] == "output_format"

    asyncio.run(scenario())


def test_several_images_and_a_drawn_seed(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            body = {"prompt": "x", "num_images": 3, "metadata": {"order": 5, "who": "ä"}}
            first = (await it.generate(body)).json()
            second = (await it.generate(body)).json()
            assert 0 <= first["seed"] <= MAX_SEED
            assert first["seed"] != second["seed"]
            seeds = [image["seed"] for image in first["images"]]
            assert seeds == [first["seed"] + k for k in range(3)]
            assert first["metadata"] == {"order": 5, "who": "ä"}

    asyncio.run(scenario())


def test_warnings_reach_the_caller(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            assert (await it.generate({"prompt": "warn"})).json()["warnings"] == ["a warning"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [("fail", 500, "job-failed"), ("fail out-of-memory", 503, "out-of-memory")],
)
def test_a_failed_job_is_a_problem(
    redis_url: str, tmp_path: Path, prompt: str, status: int, code: str
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"prompt": prompt}, accept="image/png")
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/problem+json"
            assert ("retry-after" in answer.headers) == (status == 503)
            problem = answer.json()
            assert (problem["code"], problem["detail"]) == (code, "It broke.")
            job = (await it.client.get(f"/jobs/{problem['job']}")).json()
            assert job["status"] == "failed"
            assert job["error"]["detail"] == "It broke."

    asyncio.run(scenario())


def test_a_job_canceled_by_another_caller_is_409(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            blocker = (await it.generate({"prompt": "hang"}, prefer="respond-async")).json()
            await it.until(blocker["id"], "running")
            waiting = asyncio.create_task(it.generate({"prompt": "behind"}))
            while await it.queue.depth() == 0:
                await asyncio.sleep(0.01)
            (job_id,) = await it.queue.redis.zrange("{lumina}:queued:default", 0, -1)
            await it.client.post(f"/jobs/{job_id}/cancel")
            answer = await waiting
            assert answer.status_code == 409
            assert answer.json()["code"] == "job-canceled"
            assert answer.json()["job"] == job_id

    asyncio.run(scenario())


def test_a_stopping_service_lets_its_waiters_go(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            waiting = asyncio.create_task(it.generate({"prompt": "hang"}))
            while not await it.queue.redis.zcard("{lumina}:lease"):
                await asyncio.sleep(0.01)
            it.app.state.context.stopping.set()
            answer = await asyncio.wait_for(waiting, 2)
            assert answer.status_code == 202
            assert answer.json()["status"] == "running"
            assert (await it.client.get("/readyz")).status_code == 503

    asyncio.run(scenario())


def test_without_a_model_503(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            answer = await it.generate({"prompt": "x"})
            assert answer.status_code == 503
            assert answer.json()["code"] == "model-not-ready"
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            assert (await it.client.get("/presets")).json()["code"] == "model-not-ready"

    asyncio.run(scenario())


def test_a_full_queue_503(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, settings={"queue_limit": 1}) as it:
            answers = [
                await it.generate({"prompt": "hang"}, prefer="respond-async") for _ in range(4)
            ]
            full = next(answer for answer in answers if answer.status_code == 503)
            assert (full.status_code, full.json()["code"]) == (503, "queue-full")
            assert "retry-after" in full.headers

    asyncio.run(scenario())
