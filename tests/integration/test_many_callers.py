"""Two hundred watchers and fifty waiting callers at once, on an engine that only waits."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from server.embedded import EmbeddedRedis
from tests.fakes import wait_until
from tests.integration.test_one_service import Api
from tests.server.live import Sse, read_events

ROOT = Path(__file__).parents[2]
WATCHERS, CALLERS, WATCHED = 200, 50, 20
BODY = {"prompt": "x", "seed": 1}


@pytest.fixture
def base_url(tmp_path):
    """One API process and one worker whose picture takes a second."""
    redis = EmbeddedRedis(tmp_path)
    redis.start()
    settings = {
        "LUMINA_REDIS_URL": redis.url,
        "LUMINA_DATA_DIR": str(tmp_path),
        "LUMINA_MAX_RUNNING": "64",
        "LUMINA_LOG_LEVEL": "error",
    }
    argv = [sys.executable, "-m", "tests.fakes", "0.05", "20"]
    worker = subprocess.Popen(argv, cwd=ROOT, env=os.environ | settings)
    api = Api(settings)
    try:
        wait_until(api.ready, 100, "the API")
        wait_until(lambda: api.call("GET", "/presets")[0] == 200, 100, "the worker")
        yield f"http://127.0.0.1:{api.port}"
    finally:
        for process in (api.process, worker):
            process.kill()
            process.wait(20)
        redis.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nobody_is_turned_away(base_url):
    async def watch(client: httpx.AsyncClient, job_id: str) -> list[Sse]:
        story: list[Sse] = []
        while not story or story[-1].event != "succeeded":  # as long as a stream says: come back
            headers = {"last-event-id": story[-1].id or ""} if story else {}
            path = f"/jobs/{job_id}/events"
            async with client.stream("GET", path, headers=headers) as answer:
                assert answer.status_code == 200
                story += [event async for event in read_events(answer) if event.id]
        return story

    async def call(client: httpx.AsyncClient) -> int:
        return (await client.post("/generate", json=BODY)).status_code

    async def scenario() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=base_url, timeout=200, limits=limits, trust_env=False
        ) as client:
            headers = {"prefer": "respond-async"}
            jobs = [
                (await client.post("/generate", json=BODY, headers=headers)).json()["id"]
                for _ in range(WATCHED)
            ]
            watching = [watch(client, jobs[k % WATCHED]) for k in range(WATCHERS)]
            calling = [call(client) for _ in range(CALLERS)]
            stories, statuses = await asyncio.gather(
                asyncio.gather(*watching), asyncio.gather(*calling)
            )
        assert statuses == [200] * CALLERS
        for place, story in enumerate(stories):
            assert [event.event for event in story[:2]] == ["queued", "started"]
            assert [e.event for e in story if e.event == "succeeded"] == ["succeeded"]
            assert [e.id for e in story] == [e.id for e in stories[place % WATCHED]]

    asyncio.run(scenario())
