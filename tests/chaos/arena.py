"""Arena: a Redis of its own, worker processes whose engine only waits, and a reaper beside them."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from server.embedded import EmbeddedRedis
from server.errors import QueueUnavailable
from server.protocol import JobSpec, new_job_id
from server.queue import keys
from server.queue.blobs import BlobStore
from server.queue.connection import connect, end_tasks
from server.queue.jobs import JobQueue
from server.queue.upkeep import Upkeep
from tests.chaos.history import Verdict, judge

ROOT = Path(__file__).parents[2]
LEASE_S = 2.0
MANY_ATTEMPTS = 1000  # random kills would honestly dead-letter a job


class Arena:
    """What a row needs: jobs, workers, and ways to hurt them."""

    def __init__(self, redis: EmbeddedRedis, folder: Path, max_attempts: int) -> None:
        self.redis = redis
        self.folder = folder
        self.max_attempts = max_attempts
        self.queue = self.open_queue()
        self.acknowledged: list[str] = []
        self.blobs = BlobStore(f"file://{folder / 'blobs'}")
        self.workers: list[subprocess.Popen[bytes]] = []

    def open_queue(self, url: str = "", **changes: Any) -> JobQueue:
        options = {"queue_limit": 100_000, "tenant_limit": 100_000, **changes}
        return JobQueue(
            connect(url or self.redis.url), lease_s=LEASE_S, max_attempts=self.max_attempts,
            **options,
        )  # fmt: skip

    def start_worker(
        self, step_s: float = 0.02, num_steps: int = 10, clock_s: float = 0.0, **changes: str
    ) -> subprocess.Popen[bytes]:
        """A worker whose clock is `clock_s` ahead; `changes` go to its environment."""
        settings = {
            "LUMINA_REDIS_URL": self.redis.url,
            "LUMINA_DATA_DIR": str(self.folder),
            "LUMINA_LEASE_S": str(LEASE_S),
            "LUMINA_MAX_ATTEMPTS": str(self.max_attempts),
            "LUMINA_MAX_RUNNING": "8",
            "LUMINA_DRAIN_S": "1",
            "LUMINA_LOG_LEVEL": "error",
            **changes,
        }
        argv = [sys.executable, "-m", "tests.fakes", str(step_s), str(num_steps), str(clock_s)]
        process = subprocess.Popen(
            argv, cwd=ROOT, env=os.environ | settings, stderr=subprocess.DEVNULL
        )
        self.workers.append(process)
        return process

    async def ready(self, count: int) -> None:
        await self.until(lambda: self._alive(count), 120)

    async def _alive(self, count: int) -> bool:
        return len(await self.queue.workers()) >= count

    async def submit(
        self, prompt: str = "a", queue: JobQueue | None = None, **options: object
    ) -> str:
        """Submit until it is acknowledged: repeating is safe."""
        job_id = new_job_id()
        while True:
            try:
                spec = JobSpec(prompt=prompt, seed=1)
                await (queue or self.queue).submit(job_id, spec, **options)  # type: ignore[arg-type]
                self.acknowledged.append(job_id)
                return job_id
            except QueueUnavailable:
                await asyncio.sleep(0.1)

    async def until(
        self, condition: Callable[[], Awaitable[bool]], timeout_s: float = 120.0
    ) -> float:
        """Wait for a condition, whatever Redis does meanwhile; returns the seconds it took."""
        started = time.monotonic()
        while time.monotonic() - started < timeout_s:
            with contextlib.suppress(QueueUnavailable):
                if await condition():
                    return time.monotonic() - started
            await asyncio.sleep(0.05)
        raise AssertionError(f"did not come true within {timeout_s} s")

    async def judge(self, *allowed: str) -> Verdict:
        """The history of all jobs that were acknowledged."""
        return await judge(self.queue, self.acknowledged, allowed or ("succeeded",), self.blobs)

    async def charged(self, attempts: int = 1) -> list[str]:
        """Jobs with another number of attempts."""
        records = [(job_id, await self.queue.get(job_id)) for job_id in self.acknowledged]
        return [job_id for job_id, found in records if not found or found.attempts != attempts]

    async def all_ended(self, timeout_s: float = 240.0) -> float:
        async def ended() -> bool:
            open_jobs = await self.queue.ask(self.queue.redis.keys(f"{keys.PREFIX}open:*"))
            return not open_jobs

        return await self.until(ended, timeout_s)

    async def running_on(self, worker: "subprocess.Popen[bytes]") -> list[str]:
        """The jobs that a worker process holds right now (its id contains its process id)."""
        mine = []
        for job_id in await self.queue.redis.zrange(keys.LEASE, 0, -1):
            name = await self.queue.redis.hget(keys.job(job_id), "worker")
            if name and name.split("-")[-2] == str(worker.pid):
                mine.append(job_id)
        return mine

    def kill_redis(self) -> None:
        self.redis.child.signal(signal.SIGKILL)
        while self.redis.child.running:
            time.sleep(0.01)

    def reap_worker(self, worker: "subprocess.Popen[bytes]") -> None:
        worker.kill()
        worker.wait(20)
        self.workers.remove(worker)


@contextlib.asynccontextmanager
async def arena(
    folder: Path, max_attempts: int = MANY_ATTEMPTS, fsync: str = "everysec"
) -> AsyncIterator[Arena]:
    """A fresh arena; its processes are gone afterwards."""
    redis = EmbeddedRedis(folder, fsync=fsync)
    redis.start()
    it = Arena(redis, folder, max_attempts)
    keeper = it.open_queue()
    upkeep = asyncio.create_task(Upkeep(keeper).run())
    try:
        yield it
    finally:
        await end_tasks(upkeep)
        for worker in list(it.workers):
            worker.send_signal(signal.SIGCONT)
            it.reap_worker(worker)
        await keeper.close()
        await it.queue.close()
        redis.stop()


async def trickle(it: Arena, pause_s: float, **options: Any) -> None:
    """Submit for ever."""
    while True:
        await it.submit(**options)
        await asyncio.sleep(pause_s)
