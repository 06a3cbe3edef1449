"""Rows of the fault table about what lies between: the network, the readers, the blob store."""

import asyncio
import random
import resource
import sys
import time
from pathlib import Path

from server.errors import IdempotencyMismatch, QueueUnavailable
from server.protocol import JobSpec, new_job_id
from server.queue.blobs import BlobStore
from server.queue.connection import end_tasks
from server.queue.jobs import Idempotency
from tests.chaos.arena import ROOT, arena, trickle
from tests.chaos.table import Row
from tests.tcp_proxy import proxy

CALL_LIMIT_S = 5.0


async def bad_network(folder: Path, times: int) -> Row:
    """Half-open connections, resets after a submit, 2 s of latency, for callers and workers alike:
    a retry with the key is the same job, and nothing hangs for more than 5 s."""
    async with arena(folder) as it, proxy(it.redis.url.removeprefix("unix://")) as wire:
        queue = it.open_queue(wire.url)
        await queue.preflight()  # as every process does: sends the scripts
        for _ in range(2):
            it.start_worker(LUMINA_REDIS_URL=wire.url)
        await it.ready(2)
        row = Row("bad network", times, limit_s=CALL_LIMIT_S + 0.5)
        for number in range(times):
            fault = ("silent", "lose_answers", "delay_s")[number % 3]
            setattr(wire, fault, 1.0 if fault == "delay_s" else True)
            ids = set()
            for attempt in range(3):
                if attempt == 2:
                    setattr(wire, fault, 0.0 if fault == "delay_s" else False)
                key, spec = Idempotency(f"key{number}", "body"), JobSpec(prompt="a", seed=1)
                began = time.monotonic()
                try:
                    ids.add((await queue.submit(new_job_id(), spec, idempotency=key)).id)
                except QueueUnavailable:
                    pass
                except IdempotencyMismatch:
                    row.complaints.append("a key was mistaken for another")
                row.recovery_s.append(time.monotonic() - began)
            row.demand(len(ids) == 1, f"{len(ids)} jobs for one key")
            it.acknowledged += ids
            await it.submit()  # past the proxy: the workers must be there for it
        await it.all_ended()
        row.verdict = await it.judge()
        row.demand(all(w.poll() is None for w in it.workers), "a worker did not live through it")
        await queue.close()
        return row


async def reader_killed_mid_stream(folder: Path, times: int) -> Row:
    """A process that tells a job's story is killed; the next goes on without a gap or a repeat."""
    async with arena(folder) as it:
        it.start_worker(step_s=0.05, num_steps=200)
        await it.ready(1)
        row = Row("reader killed mid-stream", 0)
        for _ in range(times):
            job_id = await it.submit()
            told: list[str] = []
            while not told or told[-1].split()[1] != "succeeded":
                after = told[-1].split()[0] if told else "0-0"
                told += await _read_some(it.redis.url, job_id, after, random.uniform(0.3, 1.0))
                row.faults += 1
            whole = [f"{event.id} {event.type}" for event in await _story(it.queue, job_id)]
            row.demand(told == whole, f"{job_id}: told {len(told)} of {len(whole)} events")
        await it.all_ended()
        row.verdict = await it.judge()
        row.demand(row.faults > times, "no reader was killed in the middle")
        return row


async def _story(queue, job_id):  # type: ignore[no-untyped-def]
    story = [await queue.events(job_id)]
    while story[-1]:
        story.append(await queue.events(job_id, story[-1][-1].id))
    return [event for page in story for event in page]


async def _read_some(url: str, job_id: str, after: str, life_s: float) -> list[str]:
    """What a reader process says before it is killed, or ends; whole lines only."""
    argv = [sys.executable, "-m", "tests.chaos.reader", url, job_id, after]
    reader = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert reader.stdout is not None
    first = await reader.stdout.readline()
    try:
        rest, _ = await asyncio.wait_for(asyncio.shield(_drain := asyncio.ensure_future(
            reader.communicate())), life_s)  # fmt: skip
    except TimeoutError:
        reader.kill()
        rest, _ = await _drain
    return [line.decode() for line in (first + rest).split(b"\n")[:-1]]


async def blob_store_failing(folder: Path, times: int) -> Row:
    """Disks that are full, writes that break off, stores that cut silently: no success without a
    readable picture of the right hash."""
    async with arena(folder, max_attempts=4) as it:
        it.start_worker(LUMINA_BLOB_URL=f"flaky://{folder}/blobs")
        full = it.start_worker()
        await it.ready(2)
        row = Row("blob store failing or disk full", 0)
        it.blobs = BlobStore(f"file://{folder}/blobs")
        for _ in range(times):
            load = asyncio.create_task(trickle(it, 0.05))
            # From here on the kernel refuses every file longer than ten bytes.
            resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
            await asyncio.sleep(1.0)
            resource.prlimit(
                full.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            await asyncio.sleep(0.5)
            await end_tasks(load)
        await it.all_ended()
        row.verdict = await it.judge("succeeded", "failed")
        records = [await it.queue.get(job_id) for job_id in it.acknowledged]
        row.faults = sum(record.attempts - 1 for record in records if record)
        row.demand(row.faults > 0, "no write failed")
        codes = {record.error.code for record in records if record and record.error}
        row.demand(codes <= {"store-failed"}, f"jobs failed for {codes}")
        row.demand(all(w.poll() is None for w in it.workers), "a worker did not live through it")
        return row
