"""Corpora of hostile requests: traversal, oversize, other tenants, pictures too large to draw."""

import asyncio
import gzip
import json
from pathlib import Path

import pytest

from server.api.admission import MAX_PIXEL_STEPS
from server.protocol import JobSpec, new_job_id
from tests.server.fake_worker import Service, service
from tests.server.live import live_service
from tests.server.test_api_problems import assert_problem

SECRET = "root:x:0:0"
TRAVERSAL = [
    "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
    "....//....//etc/passwd", "..\\..\\etc\\passwd", "..%5c..%5cetc%5cpasswd", "/etc/passwd",
    "%2fetc%2fpasswd", "file:///etc/passwd", "..;/..;/etc/passwd", "%c0%ae%c0%ae/etc/passwd",
    "%252e%252e%252fetc%252fpasswd", "0/../../../etc/passwd", ".%00./etc/passwd", "~root/.ssh",
    "app.py", "..%2fapp.py", "%2e%2e%2fschemas.py", "C:%5cWindows%5cwin.ini", "\u202e", "%ff%fe",
]  # fmt: skip
PLACES = [
    "/ui/{}", "/jobs/{}", "/jobs/{}/events", "/jobs/{}/images/0", "/jobs/{id}/images/{}",
    "/v1/models/{}", "/docs/{}", "/{}",
]  # fmt: skip


async def raw(it: Service, target: str) -> tuple[int, bytes]:
    """GET a target as it is: clients would tidy it up."""
    url = it.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ", 2)[1]), answer


def test_no_path_leads_outside(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": "x"})).json()
            for place in PLACES:
                for hostile in TRAVERSAL:
                    target = place.replace("{id}", job["id"]).replace("{}", hostile)
                    status, answer = await raw(it, target)
                    assert status in (400, 404), target
                    assert SECRET.encode() not in answer
                    assert b"import" not in answer
            assert (await it.client.get(f"/jobs/{job['id']}/images/0")).status_code == 200

    asyncio.run(scenario())


def test_names_in_a_body_are_no_paths(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for hostile in TRAVERSAL:
                for field, value in [
                    ("model", hostile), ("preset", hostile), ("loras", [{"name": hostile}]),
                ]:  # fmt: skip
                    answer = await it.generate({"prompt": "x", field: value})
                    assert_problem(answer, 422)
            assert not list(tmp_path.rglob("*.png"))

    asyncio.run(scenario())


def test_what_is_too_large_is_refused_before_it_costs_anything(
    redis_url: str, tmp_path: Path
) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    # (body, content type beside JSON's, status)
    corpus: list[tuple[bytes, dict[str, str], int]] = [
        (b'{"prompt":"' + b"x" * 65_536 + b'"}', {}, 413),
        (b'{"prompt":"' + b"x" * 60_000 + b'"}', {}, 422),
        (b" " * 10_000_000, {}, 413),
        (b"{}", {"content-length": "99999999999"}, 413),
        (deep[:65_000].encode(), {}, 400),
        (gzip.compress(b'{"prompt":"' + b"x" * 5_000_000 + b'"}'), {"content-encoding": "gzip"},
         400),
        (json.dumps({"prompt": "x", "sigmas": [0.5] * 9000}).encode(), {}, 422),
        (json.dumps({"prompt": "x", "metadata": {"a": "b" * 600}}).encode(), {}, 422),
        (json.dumps({str(k): k for k in range(4000)}).encode(), {}, 422),
        (b'{"seed":' + b"9" * 60_000 + b"}", {}, 400),
    ]  # fmt: skip

    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for data, headers, status in corpus:
                for path in ("/generate", "/v1/images/generations"):
                    given = {"content-type": "application/json", **headers}
                    answer = await it.client.post(path, content=data, headers=given)
                    openai = path.startswith("/v1") and status == 422
                    assert answer.status_code == (400 if openai else status), data[:40]
                    assert len(answer.content) < 20_000
            long = await it.client.get("/jobs/" + "x" * 5000)
            assert_problem(long, 404)
            assert await it.queue.redis.keys("{lumina}:job:*") == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "bomb",
    [
        {"width": 65_536, "height": 65_536},
        {"width": 2**31, "height": 16},
        {"width": 10**300},
        {"num_images": 10**6},
        {"num_inference_steps": 10**9},
        {"width": 1 << 62, "num_images": 8, "num_inference_steps": 50},
        {"sigmas": [1 - k / 2000 for k in range(1000)]},
    ],
)
def test_pictures_that_no_device_could_draw(
    redis_url: str, tmp_path: Path, bomb: dict[str, object]
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            assert_problem(await it.generate({"prompt": "x", **bomb}), 422, "invalid-request")
            size = f"{min(int(str(bomb.get('width', 64))), 99_999)}x{bomb.get('height', 64)}"
            answer = await it.client.post(
                "/v1/images/generations", json={"prompt": "x", "n": 8, "size": f"9{size}"}
            )
            assert answer.status_code == 400
            assert await it.queue.redis.keys("{lumina}:job:*") == []

    asyncio.run(scenario())
    assert MAX_PIXEL_STEPS == 8 * 1024 * 1024 * 100


def test_another_tenants_job_does_not_exist_anywhere(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            other = new_job_id()
            await it.queue.submit(other, JobSpec(prompt="hang", seed=1), tenant="somebody")
            unknown = new_job_id()
            for method, path in [
                ("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/images/0"),
                ("POST", "/cancel"),
            ]:  # fmt: skip
                theirs = await it.client.request(method, f"/jobs/{other}{path}")
                nobodys = await it.client.request(method, f"/jobs/{unknown}{path}")
                found = assert_problem(theirs, 404, "not-found")
                assert found["detail"].replace(other, unknown) == nobodys.json()["detail"]
            assert (await it.client.get("/jobs")).json() == {"jobs": []}
            record = await it.queue.get(other)
            assert record is not None
            assert not record.finished

    asyncio.run(scenario())
