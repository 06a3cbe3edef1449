"""Row of the fault table about requests nobody would send."""

import asyncio
import random
import time
from pathlib import Path

import httpx

from server.embedded import EmbeddedRedis
from tests.chaos.history import Verdict
from tests.chaos.table import Row
from tests.server.fuzzing import fuzz_anything, fuzz_documented
from tests.server.live import service_process

PATIENCE_S = 120.0


async def fuzzed_requests(folder: Path, times: int) -> Row:
    """Requests made from the OpenAPI document and requests made of anything: no 5xx that was not
    asked for, no undocumented status, and the service goes on."""
    return await asyncio.to_thread(_fuzz, folder, times)


def _fuzz(folder: Path, times: int) -> Row:
    row = Row("fuzzed requests", times)
    redis = EmbeddedRedis(folder)
    redis.start()
    try:
        with service_process(redis.url, folder, sync_timeout=2.0) as base_url:
            for _ in range(times):
                chosen = random.randrange(2**32)
                try:
                    jobs = [draw(base_url) for _ in range(5)]
                    fuzz_documented(base_url, 40, chosen, jobs)
                    fuzz_anything(base_url, 1000, chosen)
                    draw(base_url)
                except Exception as error:  # whatever a check or a client says
                    words = " ".join(str(error).split())[:300]
                    row.complaints.append(f"seed {chosen}: {type(error).__name__}: {words}")
                row.verdict = Verdict(jobs=row.verdict.jobs + 6)
    finally:
        redis.stop()
    return row


def draw(base_url: str) -> str:
    """Draw a picture, behind whatever the fuzzing has left in the queue."""
    with httpx.Client(base_url=base_url, timeout=30, trust_env=False) as client:
        answer = client.post("/generate", json={"prompt": "x"})
        assert answer.status_code in (200, 202), answer.text
        job_id: str = answer.json()["id"]
        deadline = time.monotonic() + PATIENCE_S
        while (job := client.get(f"/jobs/{job_id}").json())["status"] != "succeeded":
            assert job["status"] in ("queued", "running"), job
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
    return job_id
