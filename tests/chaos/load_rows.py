"""Rows of the fault table about load, and about what must not grow."""

import asyncio
import time
from pathlib import Path

from server.errors import QueueFull, TooManyJobs
from server.protocol import JobSpec, new_job_id
from server.queue import keys
from server.queue.connection import end_tasks
from server.queue.jobs import JobQueue
from tests.chaos.arena import Arena, arena, trickle
from tests.chaos.table import Row

QUEUE_LIMIT, TENANT_LIMIT = 100, 60
NO_TTL = ("seq", "epoch", "stats", "pools", "model:", "workers:", "served:", "lease", "open:")


async def overload_by_a_noisy_tenant(folder: Path, times: int) -> Row:
    """10x overload, 1 noisy tenant among `times`: the depth is bounded, and a quiet tenant's p95 is
    at most the unloaded p95 and one mean job."""
    async with arena(folder) as it:
        it.start_worker(step_s=0.01, num_steps=10, LUMINA_MAX_RUNNING="1")
        await it.ready(1)
        door = it.open_queue(queue_limit=QUEUE_LIMIT, tenant_limit=TENANT_LIMIT)
        row = Row("10x overload, 1 noisy tenant", 0)
        unloaded, _ = await _quiet_jobs(it, door, times - 1)
        noise = asyncio.create_task(_noise(it, door, row))
        await it.until(lambda: _deep(door), 60)
        row.recovery_s, mean_s = await _quiet_jobs(it, door, times - 1)
        noise.cancel()
        await asyncio.wait([noise])
        at = int(0.95 * len(unloaded))
        allowed, got = sorted(unloaded)[at] + mean_s, row.percentile(0.95)
        row.demand(got <= allowed, f"p95 {got:.2f} s, allowed {allowed:.2f} s")
        row.demand(row.faults > 0, "nothing was refused: that was no overload")
        await it.all_ended()
        row.verdict = await it.judge()
        await door.close()
        return row


async def _quiet_jobs(it: Arena, door: JobQueue, tenants: int) -> tuple[list[float], float]:
    """How long each waited in the queue, and the mean length of a job, in seconds."""
    waits, lengths = [], []
    for number in range(tenants):
        job_id = await it.submit(queue=door, tenant=f"quiet{number}", cost_ms=100)
        record = await door.wait(job_id, 60)
        started_ms = record.started_ms or 0
        waits.append((started_ms - record.submitted_ms) / 1000)
        lengths.append(((record.finished_ms or 0) - started_ms) / 1000)
    return waits, sum(lengths) / len(lengths)


async def _deep(door: JobQueue) -> bool:
    return await door.depth() >= TENANT_LIMIT - 10


async def _noise(it: Arena, door: JobQueue, row: Row) -> None:
    """Ten times what the worker gets done, for ever; counts what is refused as faults."""
    while True:
        job_id = new_job_id()
        try:
            await door.submit(job_id, JobSpec(prompt="a", seed=1), tenant="noisy", cost_ms=100)
            it.acknowledged.append(job_id)
        except (TooManyJobs, QueueFull):
            row.faults += 1
        depth = await door.depth()
        row.demand(depth <= QUEUE_LIMIT, f"{depth} jobs queued")
        await asyncio.sleep(0.01)  # a job takes a tenth of a second


async def soak(folder: Path, seconds: int) -> Row:
    """Workers do not grow under load, and once the results have expired (60 s) neither has Redis:
    what is left is what was there before, and all of it that belongs to a job will expire."""
    async with arena(folder) as it:
        it.queue.result_ttl = 60
        for _ in range(2):
            it.start_worker(step_s=0.002, num_steps=2, LUMINA_RESULT_TTL="60")
        await it.ready(2)
        row = Row("soak", 0)
        before = await _redis_mib(it)
        load = asyncio.create_task(trickle(it, 0.01))
        samples: list[tuple[float, ...]] = []
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            await asyncio.sleep(2.0)
            at = time.monotonic() - began
            samples.append((at, *(_resident_mib(worker.pid) for worker in it.workers)))
            cut = max(0, len(it.acknowledged) - 500)
            row.verdict.jobs += cut  # what came earlier has expired or soon will
            del it.acknowledged[:cut]
        await end_tasks(load)
        await it.all_ended()
        earlier = row.verdict.jobs
        row.verdict = await it.judge()
        row.verdict.jobs += earlier
        row.complaints += [f"{key} never expires" for key in await _eternal(it.queue)]
        steady = [sample for sample in samples if sample[0] > seconds / 3]
        for place in range(1, 1 + len(it.workers)):
            mib = _slope([(sample[0], sample[place]) for sample in steady]) * 60
            row.demand(mib < 1, f"a worker grows by {mib:.2f} MiB a minute")
        await asyncio.sleep(65)
        grown = await _redis_mib(it) - before
        row.demand(grown < 1, f"Redis has grown by {grown:.2f} MiB")
        return row


async def _redis_mib(it: Arena) -> float:
    memory = await it.queue.ask(it.queue.redis.info("memory"))
    return float(memory["used_memory_dataset"]) / 2**20


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def _slope(points: list[tuple[float, float]]) -> float:
    """The least-squares slope."""
    x0 = sum(x for x, _ in points) / len(points)
    y0 = sum(y for _, y in points) / len(points)
    spread = sum((x - x0) ** 2 for x, _ in points)
    return sum((x - x0) * (y - y0) for x, y in points) / spread


async def _eternal(queue: JobQueue) -> list[str]:
    """Keys without a time to live that no live thing needs, when all jobs have ended."""
    names = [name async for name in queue.redis.scan_iter(f"{keys.PREFIX}*")]
    found = []
    for name in names:
        kind = name.removeprefix(keys.PREFIX)
        if not kind.startswith(NO_TTL) and await queue.redis.ttl(name) == -1:
            found.append(name)
    return found
