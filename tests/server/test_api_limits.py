"""What a key may: requests a minute, open jobs, jobs a day; and what GET /usage says of them."""

import asyncio
import re
from pathlib import Path

import httpx

from tests.server.fake_worker import service
from tests.server.keyed import keyed

ASYNC = {"prefer": "respond-async"}
HANG = {"prompt": "hang"}


async def submit(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/generate", json=HANG, headers=ASYNC)


def test_requests_beyond_the_rate_are_refused_and_counted_by_key(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, worker=False) as it:
            _, client = await it.member(rate=3, tenant="acme")
            _, colleague = await it.member(rate=3, tenant="acme")
            for left in (2, 1, 0):
                answer = await client.get("/presets")
                assert answer.status_code == 503  # nobody has published a model
                assert answer.headers["ratelimit-policy"] == '"requests";q=3;w=60'
                told = re.fullmatch(r'"requests";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
                assert told
                assert int(told[1]) == left
                assert 50 <= int(told[2]) <= 60
            refused = await client.post("/generate", json=HANG)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
            left = re.fullmatch(r'"requests";r=0;t=(\d+)', refused.headers["ratelimit"])
            assert left
            assert int(left[1]) <= int(refused.headers["retry-after"]) <= 91
            assert (await colleague.get("/presets")).status_code == 503
            for free in ("/usage", "/jobs/01hzzzzzzzzzzzzzzzzzzzzzzz"):
                assert (await client.get(free)).status_code in (200, 404)
            usage = (await client.get("/usage")).json()
            assert usage["requests"] == {
                "used": 3, "limit": 3, "remaining": 0, "window_s": 60,
                "resets_in_s": usage["requests"]["resets_in_s"],
            }  # fmt: skip
            # The minute is over when Redis says so.
            names = [name async for name in it.queue.redis.scan_iter("{lumina}:rate*")]
            assert names
            assert 0 < await it.queue.redis.ttl(names[0]) <= 60
            await it.queue.redis.delete(*names)
            assert (await client.get("/presets")).status_code == 503

    asyncio.run(scenario())


def test_no_race_gets_past_the_daily_quota_and_the_open_jobs(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            for limits, code in (
                ({"daily_jobs": 4}, "quota-exceeded"), ({"open_jobs": 4}, "too-many-jobs"),
            ):  # fmt: skip
                _, client = await it.member(**limits)
                answers = await asyncio.gather(*(submit(client) for _ in range(12)))
                statuses = sorted(answer.status_code for answer in answers)
                assert statuses == [202] * 4 + [429] * 8
                refused = [answer for answer in answers if answer.status_code == 429]
                assert {answer.json()["code"] for answer in refused} == {code}
                waits = [int(answer.headers["retry-after"]) for answer in refused]
                assert all(1 <= wait <= 120 for wait in waits)
                if code == "quota-exceeded":
                    again = await client.post("/v1/images/generations", json={"prompt": "x"})
                    assert again.json()["error"]["code"] == "insufficient_quota"
                    assert again.headers["x-should-retry"] == "false"
                    assert refused[0].headers["ratelimit-policy"] == '"jobs";q=4;w=86400'
                    assert re.fullmatch(r'"jobs";r=0;t=\d+', refused[0].headers["ratelimit"])
                    last = min(a.headers["ratelimit"] for a in answers if a.status_code == 202)
                    assert last.startswith('"jobs";r=0;')
            _, other = await it.member()
            free = await submit(other)
            assert free.status_code == 202
            assert "ratelimit" not in free.headers
            _, both = await it.member(rate=60, daily_jobs=9)
            told = (await submit(both)).headers
            assert told["ratelimit-policy"] == '"requests";q=60;w=60, "jobs";q=9;w=86400'
            assert re.fullmatch(r'"requests";r=59;t=\d+, "jobs";r=8;t=\d+', told["ratelimit"])

    asyncio.run(scenario())


def test_usage_tells_what_was_used_and_when_it_begins_anew(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            key, client = await it.member(open_jobs=5, daily_jobs=10, weight=3)
            for _ in range(2):
                job = (await submit(client)).json()
            await client.post(f"/jobs/{job['id']}/cancel")
            usage = (await client.get("/usage")).json()
            today = usage.pop("jobs_today")
            assert usage == {
                "tenant": key.tenant, "key": key.id, "scopes": ["generate"], "weight": 3,
                "open_jobs": {"used": 1, "limit": 5, "remaining": 4}, "requests": None,
            }  # fmt: skip
            assert (today["used"], today["limit"], today["remaining"]) == (2, 10, 8)
            assert today["device_s"] == 2 * 20 * 10.0 / 1000  # steps, ms each
            assert 0 < today["resets_in_s"] <= 24 * 3600
            assert today["resets_at"].endswith("T00:00:00.000Z")

    asyncio.run(scenario())


def test_usage_without_keys(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False, loopback_only=True) as it:
            usage = (await it.client.get("/usage")).json()
            assert (usage["tenant"], usage["key"]) == ("anonymous", None)
            assert usage["open_jobs"]["limit"] >= 64
            assert usage["jobs_today"]["limit"] is None

    asyncio.run(scenario())


def test_without_redis_nobody_is_let_in(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service("unix:///nowhere", tmp_path, worker=False, keys_required=True) as it:
            headers = {"authorization": "Bearer lumina_" + "A" * 43}
            answer = await it.client.get("/presets", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (503, "queue-unavailable")
            assert (await it.client.get("/livez")).status_code == 200

    asyncio.run(scenario())
