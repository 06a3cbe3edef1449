"""API keys at the door: who passes, who sees what, and what the signed URL of a picture opens."""

import asyncio
import re
from pathlib import Path
from urllib.parse import urlsplit

from server.protocol import new_job_id
from tests.server.fake_worker import service
from tests.server.keyed import keyed

ASYNC = {"prefer": "respond-async"}
DRAW = {"prompt": "a red circle", "num_inference_steps": 2}


def test_without_a_valid_key_nothing_but_the_open_paths_answers(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, worker=False) as it:
            for path in (
                "/",
                "/docs",
                "/livez",
                "/startupz",
                "/readyz",
                "/ui/main.js",
                "/openapi.json",
            ):
                assert (await it.anonymous.get(path)).status_code == 200, path
            refused = await it.anonymous.post("/generate", json=DRAW)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"].startswith("Bearer")
            for value in ("", "Bearer", "Bearer ", "Basic eDp5", "Bearer lumina_" + "A" * 43,
                          "Bearer nonsense", "Bearer " + "x" * 5000, "bearer \u00fc"):  # fmt: skip
                headers = [(b"authorization", value.encode("latin-1"))]
                answer = await it.anonymous.get("/presets", headers=headers)
                assert answer.status_code == 401, value

    asyncio.run(scenario())


def test_every_route_needs_a_key_unless_it_is_known_to_be_open(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, worker=False) as it:
            document = (await it.anonymous.get("/openapi.json")).json()
            tried = 0
            for path, methods in document["paths"].items():
                if path in ("/livez", "/readyz", "/startupz", "/metrics"):
                    continue
                concrete = re.sub(r"\{\w*id\}", new_job_id(), path)
                concrete = re.sub(r"\{\w+\}", "0", concrete)
                for method in methods:
                    answer = await it.anonymous.request(method, concrete)
                    assert answer.status_code == 401, (method, path)
                    tried += 1
            assert tried >= 5

    asyncio.run(scenario())


def test_the_host_header_opens_no_path(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, worker=False) as it:
            for host in ("x/livez?", "x/livez#", "x@livez", "localhost", "[::1]"):
                answer = await it.anonymous.get("/presets", headers={"host": host})
                assert answer.status_code == 401, host

    asyncio.run(scenario())


def test_a_key_draws_until_it_is_revoked(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            key, client = await it.member()
            drawn = await client.post("/generate", json=DRAW)
            assert drawn.status_code == 200
            record = await it.queue.get(drawn.json()["id"])
            assert record is not None
            assert record.tenant == key.tenant
            assert await it.ring.revoke(key.id) == key
            assert (await client.post("/generate", json=DRAW)).status_code == 401

    asyncio.run(scenario())


def test_a_signed_url_shows_its_picture_to_a_browser_and_nothing_else(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            _, client = await it.member()
            drawn = await client.post("/generate", json=DRAW | {"num_images": 2})
            first, second = (image["url"] for image in drawn.json()["images"])
            job_id = drawn.json()["id"]
            shown = await it.anonymous.get(first)
            assert (shown.status_code, shown.headers["content-type"]) == (200, "image/png")
            assert (await client.get(urlsplit(first).path)).status_code == 200
            query = urlsplit(first).query
            later = query.replace("expires=", "expires=9")
            for path in (
                urlsplit(first).path, f"{urlsplit(second).path}?{query}",
                f"{urlsplit(first).path}?{later}", f"/jobs/{job_id}?{query}",
                f"/jobs/{new_job_id()}/images/0?{query}", f"/presets?{query}",
            ):  # fmt: skip
                assert (await it.anonymous.get(path)).status_code == 401, path
            assert (await it.anonymous.post(first)).status_code in (401, 405)
            again = await client.get(f"/jobs/{job_id}")
            assert [image["url"] for image in again.json()["images"]] == [first, second]

    asyncio.run(scenario())


def test_another_tenants_jobs_do_not_exist(redis_url: str, tmp_path: Path) -> None:
    """Whatever route names a job: 404, in the words of one that never was, and nothing happens."""

    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            _, owner = await it.member()
            _, other = await it.member(scopes=("generate", "admin"))
            done = (await owner.post("/generate", json=DRAW)).json()["id"]
            running = (await owner.post("/generate", json={"prompt": "hang"}, headers=ASYNC)).json()
            document = (await other.get("/openapi.json")).json()
            paths = [path for path in document["paths"] if path.startswith("/jobs/{")]
            assert len(paths) >= 3
            for job_id in (done, running["id"]):
                for path in paths:
                    concrete = re.sub(r"\{(?!job_id)\w+\}", "0", path)
                    for method in document["paths"][path]:
                        theirs = await other.request(method, concrete.format(job_id=job_id))
                        unknown = new_job_id()
                        none = await other.request(method, concrete.format(job_id=unknown))
                        assert theirs.status_code == none.status_code == 404, (method, path)
                        told = theirs.text.replace(job_id, unknown)
                        assert _words(told) == _words(none.text)
            record = await it.queue.get(running["id"])
            assert record is not None
            assert not record.finished
            assert (await owner.get(f"/jobs/{done}")).json()["status"] == "succeeded"
            if "/jobs" in document["paths"]:
                assert done not in (await other.get("/jobs")).text
                assert done in (await owner.get("/jobs")).text

    asyncio.run(scenario())


def _words(text: str) -> str:
    return re.sub(r'"request_id":"\w+"', "", text)


def test_an_idempotency_key_belongs_to_its_tenant(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            headers = {"idempotency-key": "order 7"}
            ids = set()
            for _ in range(2):
                _, client = await it.member()
                answers = [await client.post("/generate", json=DRAW, headers=headers) for _ in "ab"]
                assert answers[0].json() == answers[1].json()
                ids.add(answers[0].json()["id"])
            assert len(ids) == 2

    asyncio.run(scenario())


def test_without_keys_an_authorization_header_is_ignored(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, loopback_only=True) as it:
            for value in ("Bearer lumina_wrong", "Basic eDp5"):
                answer = await it.generate(DRAW, authorization=value)
                assert answer.status_code == 200
            assert "?" not in answer.json()["images"][0]["url"]

    asyncio.run(scenario())


def test_pages_of_other_sites_change_nothing(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, loopback_only=True) as it:
            for origin in ("http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]"):
                assert (await it.generate(DRAW, origin=origin)).status_code == 200, origin
            for origin in ("https://evil.example", "null", "http://localhost.evil.example",
                           "http://evil.example/localhost", "file://", ""):  # fmt: skip
                answer = await it.generate(DRAW, origin=origin)
                assert (answer.status_code, answer.json()["code"]) == (403, "foreign-origin")

    asyncio.run(scenario())


def test_openai_paths_refuse_in_openais_words(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            _, limited = await it.member(rate=1)
            _, admin = await it.member(scopes=("admin",))
            assert (await limited.get("/v1/models")).status_code == 200
            for client, status, code in (
                (it.anonymous, 401, "invalid_api_key"), (admin, 403, "missing_scope"),
                (limited, 429, "rate_limit_exceeded"),
            ):  # fmt: skip
                answer = await client.get("/v1/models")
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            _, client = await it.member()
            body = {"prompt": "x", "response_format": "url"}
            url = (await client.post("/v1/images/generations", json=body)).json()["data"][0]["url"]
            assert url.startswith("http://lumina.example/jobs/")
            assert (await it.anonymous.get(url)).status_code == 200

    asyncio.run(scenario())
