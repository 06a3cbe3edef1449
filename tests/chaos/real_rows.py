"""Rows of the fault table with the real engine and the bundled checkpoint: `lumina serve`."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from server.queue import keys
from server.queue.blobs import BlobStore
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.chaos.arena import LEASE_S, ROOT
from tests.chaos.history import Verdict, judge, queued_ms
from tests.chaos.table import Row
from tests.server.embedded.test_service import Service

CHECKPOINT = ROOT / "checkpoints" / "demo"
SMALL = {"prompt": "a red circle", "width": 64, "height": 64}


class Real:
    """A running `lumina serve`, called over HTTP; its queue is looked at from the side."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self.acknowledged: list[str] = []
        self.queue = self.open_queue()

    def open_queue(self) -> JobQueue:
        socket = (self.folder / "data" / "redis" / "socket-folder").read_text()
        return JobQueue(connect(f"unix://{socket}/redis.sock"), lease_s=LEASE_S)

    async def post(self, steps: int, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = SMALL | {"num_inference_steps": steps, "seed": 1} | fields
        return await asyncio.to_thread(
            self._call, "POST", "/generate", body, {"Prefer": "respond-async"}
        )

    async def submit(self, steps: int = 20, **fields: Any) -> str:
        """Submit until it is acknowledged, with a key: a retry is the same job."""
        key = {"idempotency-key": os.urandom(8).hex()}
        body = SMALL | {"num_inference_steps": steps, "seed": 1} | fields
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                headers = key | {"Prefer": "respond-async"}
                status, answer = await asyncio.to_thread(
                    self._call, "POST", "/generate", body, headers
                )
                if status in (200, 202):
                    self.acknowledged.append(answer["id"])
                    return str(answer["id"])
            await asyncio.sleep(0.2)

    def _call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=20)
        try:
            given = {"content-type": "application/json", **(headers or {})}
            connection.request(method, path, json.dumps(body) if body else None, given)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    async def call(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        return await asyncio.to_thread(self._call, method, path)

    async def running(self) -> list[str]:
        """Ids of the jobs that are being drawn."""
        found: list[str] = await self.queue.ask(self.queue.redis.zrange(keys.LEASE, 0, -1))
        return found

    async def until_running(self) -> list[str]:
        deadline = time.monotonic() + 120
        while not (found := await self.running()):
            assert time.monotonic() < deadline, "nothing runs"
            await asyncio.sleep(0.02)
        return found

    async def until_ended(self, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while await self.queue.open_jobs():
            assert time.monotonic() < deadline, "jobs do not end"
            await asyncio.sleep(0.2)

    async def judge(self, *allowed: str) -> Verdict:
        blobs = BlobStore(f"file://{self.folder / 'data' / 'blobs'}")
        return await judge(self.queue, self.acknowledged, allowed or ("succeeded",), blobs)

    async def charged(self) -> list[str]:
        records = [(job_id, await self.queue.get(job_id)) for job_id in self.acknowledged]
        return [job_id for job_id, found in records if not found or found.attempts != 1]


@contextlib.asynccontextmanager
async def real(folder: Path, workers: int = 1, **settings: Any) -> AsyncIterator[Real]:
    """`lumina serve` with the bundled checkpoint, ready; gone afterwards."""
    options = {"lease_s": LEASE_S, "max_attempts": 1000, "log_level": "error", **settings}
    service = Service(CHECKPOINT, folder / "data", workers=workers, **options)
    try:
        await asyncio.to_thread(service.wait_ready)
        it = Real(service, folder)
        try:
            yield it
        finally:
            await it.queue.close()
    finally:
        service.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(Exception):
            await asyncio.to_thread(service.process.wait, 45)
        service.end()


async def kill_9_a_worker(folder: Path, times: int) -> Row:
    """0 lost, 0 duplicate; taken back within lease + 5 s."""
    async with real(folder) as it:
        row = Row("kill -9 a worker, real engine", times, limit_s=LEASE_S + 5)
        hit: list[tuple[str, float]] = []
        for _ in range(times):
            for _ in range(3):
                await it.submit(steps=50)
            mine = await it.until_running()
            await asyncio.sleep(random.uniform(0.0, 0.3))
            (worker,) = it.service.workers()
            mine = [job_id for job_id in mine if job_id in await it.running()]
            hit += [(job_id, time.time()) for job_id in mine]
            os.kill(worker, signal.SIGKILL)
            await it.until_ended()
        for job_id, at in hit:
            later = [ms / 1000 - at for ms in await queued_ms(it.queue, job_id) if ms / 1000 > at]
            row.recovery_s += later[:1]
        row.demand(bool(row.recovery_s), "no kill hit a running job")
        row.verdict = await it.judge()
        return row


async def sigterm_a_worker(folder: Path, times: int) -> Row:
    """0 failed, attempts not charged, exits within its grace; the supervisor starts it again."""
    async with real(folder, drain_s=1) as it:
        row = Row("SIGTERM a worker, real engine", times, limit_s=1 + 10)
        for _ in range(times):
            for _ in range(4):
                await it.submit(steps=50)
            await it.until_running()
            (worker,) = it.service.workers()
            began = time.monotonic()
            os.kill(worker, signal.SIGTERM)
            while Path(f"/proc/{worker}").exists() and worker in it.service.workers():
                await asyncio.sleep(0.05)
            row.recovery_s.append(time.monotonic() - began)
            await it.until_ended()
        row.verdict = await it.judge()
        row.demand(not await it.charged(), "an attempt was charged")
        return row


async def kill_9_redis_of_serve(folder: Path, times: int) -> Row:
    """The API answers 503 within a second; `lumina serve` starts its Redis again, and the workers
    go on within 10 s without a restart."""
    async with real(folder) as it:
        row = Row("kill -9 Redis of lumina serve", times, limit_s=10.0)
        workers = it.service.workers()
        for _ in range(times):
            for _ in range(3):
                await it.submit(steps=30)
            await it.until_running()
            children = it.service.children().items()
            (redis,) = [pid for pid, command in children if "redis-server" in command]
            os.kill(redis, signal.SIGKILL)
            began = time.monotonic()
            status, _ = await it.call("GET", "/readyz")
            row.demand(time.monotonic() - began < 1.5, "the API hung")
            row.demand(status == 503, f"/readyz answered {status}")
            job_id = await it.submit(steps=2)
            while (await it.call("GET", f"/jobs/{job_id}"))[1].get("status") != "succeeded":
                assert time.monotonic() - began < 60
                await asyncio.sleep(0.1)
            row.recovery_s.append(time.monotonic() - began)
            await it.until_ended()
        row.demand(it.service.workers() == workers, "a worker did not live through it")
        row.verdict = await it.judge()
        return row


async def cancel_racing_completion(folder: Path, times: int) -> Row:
    """One terminal status, whoever wins."""
    async with real(folder) as it:
        row = Row("cancel, real engine", times)
        for _ in range(times):
            job_id = await it.submit(steps=4)
            await asyncio.sleep(random.uniform(0.0, 0.5))
            status, _ = await it.call("POST", f"/jobs/{job_id}/cancel")
            row.demand(status == 200, f"cancel answered {status}")
        await it.until_ended()
        row.verdict = await it.judge("succeeded", "canceled")
        return row


async def overload(folder: Path, times: int) -> Row:
    """Ten times as many as the queue holds: bounded depth, clean refusals, no failure among the
    accepted."""
    async with real(folder, queue_limit=times) as it:
        row = Row("10x overload, real engine", 0)
        for _ in range(10 * times):
            status, answer = await it.post(steps=10)
            if status == 202:
                it.acknowledged.append(answer["id"])
            else:
                row.faults += 1
                row.demand((status, answer["code"]) == (503, "queue-full"), f"{status} {answer}")
            depth = await it.queue.depth()
            row.demand(depth <= times, f"{depth} jobs queued")
        row.demand(row.faults > 0, "nothing was refused")
        await it.until_ended()
        row.verdict = await it.judge()
        row.demand(not await it.charged(), "an attempt was charged")
        return row
