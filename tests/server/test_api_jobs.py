"""GET /jobs/{id}, its pictures and its cancellation."""

import asyncio
from pathlib import Path

from server.protocol import JobSpec, new_job_id
from server.queue.blobs import BlobStore
from tests.server.fake_worker import service


def test_pictures_are_cacheable_by_their_hash(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            body = {"prompt": "x", "seed": 5, "output_format": "jpeg", "num_images": 2}
            job = (await it.generate(body)).json()
            second = job["images"][1]
            answer = await it.client.get(second["url"])
            etag = answer.headers["etag"]
            assert etag == f'"{second["sha256"]}"'
            assert answer.headers["content-type"] == "image/jpeg"
            assert "immutable" in answer.headers["cache-control"]
            assert 'filename="lumina-6.jpg"' in answer.headers["content-disposition"]
            for tags, status in [
                (etag, 304), (f'"other", W/{etag}', 304), ("*", 304), ('"other"', 200),
            ]:  # fmt: skip
                again = await it.client.get(second["url"], headers={"if-none-match": tags})
                assert again.status_code == status
                assert again.headers["etag"] == etag

    asyncio.run(scenario())


def test_there_is_no_other_picture(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": "x"})).json()
            for index in ("1", "-1", "a", "0x0", "٠", "9" * 30, "%2e%2e"):
                answer = await it.client.get(f"/jobs/{job['id']}/images/{index}")
                assert answer.status_code == 404, index
                assert answer.json()["code"] == "not-found"
            hanging = (await it.generate({"prompt": "hang"}, prefer="respond-async")).json()
            early = await it.client.get(f"/jobs/{hanging['id']}/images/0")
            assert early.status_code == 404
            assert "0 images" in early.json()["detail"]

    asyncio.run(scenario())


def test_a_picture_whose_bytes_are_gone(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": "x"})).json()
            record = await it.queue.get(job["id"])
            assert record is not None
            assert record.result is not None
            BlobStore(it.app.state.context.blobs.url).delete(record.result.images[0].path)
            answer = await it.client.get(job["images"][0]["url"])
            assert answer.status_code == 404
            assert "no longer stored" in answer.json()["detail"]

    asyncio.run(scenario())


def test_a_picture_that_was_damaged_is_not_given(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": "x"})).json()
            (file,) = [path for path in tmp_path.rglob("*.png") if path.is_file()]
            file.write_bytes(file.read_bytes()[:-1])
            answer = await it.client.get(job["images"][0]["url"])
            assert answer.status_code == 503
            assert answer.json()["code"] == "storage-unavailable"

    asyncio.run(scenario())


def test_cancel_is_safe_to_repeat_and_never_undoes_a_result(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            hanging = (await it.generate({"prompt": "hang"}, prefer="respond-async")).json()
            for _ in range(2):
                answer = await it.client.post(f"/jobs/{hanging['id']}/cancel")
                assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
            done = (await it.generate({"prompt": "x"})).json()
            late = await it.client.post(f"/jobs/{done['id']}/cancel")
            assert late.json()["status"] == "succeeded"

    asyncio.run(scenario())


def test_another_tenants_job_is_not_found(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            job_id = new_job_id()
            await it.queue.submit(job_id, JobSpec(prompt="hang", seed=1), tenant="somebody")
            for method, path in [("GET", ""), ("POST", "/cancel"), ("GET", "/images/0")]:
                answer = await it.client.request(method, f"/jobs/{job_id}{path}")
                assert answer.status_code == 404
            record = await it.queue.get(job_id)
            assert record is not None
            assert not record.finished

    asyncio.run(scenario())
