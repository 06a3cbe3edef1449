"""Rows of the fault table about workers. Their engines only wait; leases are two seconds."""

import asyncio
import random
import signal
import subprocess
import time
from pathlib import Path

from server.queue.connection import end_tasks
from tests.chaos.arena import LEASE_S, Arena, arena, trickle
from tests.chaos.history import queued_ms
from tests.chaos.table import Row


async def _recoveries(it: Arena, lost: list[tuple[str, float]]) -> list[float]:
    """Seconds from each fault until each job it hit was taken back."""
    found = []
    for job_id, at in lost:
        later = [ms / 1000 - at for ms in await queued_ms(it.queue, job_id) if ms / 1000 > at]
        found += later[:1]
    return found


async def _a_busy_worker(it: Arena) -> subprocess.Popen[bytes]:
    """A worker that has jobs running; waits for one, as a busy machine is slow to start any."""
    busy: list[subprocess.Popen[bytes]] = []

    async def some() -> bool:
        busy[:] = [each for each in it.workers if await it.running_on(each)]
        return bool(busy)

    await it.until(some)
    return random.choice(busy)


async def kill_9_a_worker_mid_batch(folder: Path, times: int) -> Row:
    """0 lost, 0 duplicate; reclaimed within lease + 5 s at p99."""
    async with arena(folder) as it:
        for _ in range(3):
            it.start_worker()
        await it.ready(3)
        load = asyncio.create_task(trickle(it, 0.1))
        hit: list[tuple[str, float]] = []
        for _ in range(times):
            await asyncio.sleep(random.uniform(0.3, 0.8))
            victim = await _a_busy_worker(it)
            hit += [(job_id, time.time()) for job_id in await it.running_on(victim)]
            it.reap_worker(victim)
            it.start_worker()
        await end_tasks(load)
        await it.all_ended()
        row = Row("kill -9 a worker mid-batch", times, await it.judge())
        row.recovery_s, row.limit_s = await _recoveries(it, hit), LEASE_S + 5
        row.complaints += [] if row.recovery_s else ["no kill hit a running job"]
        return row


async def sigstop_a_worker_past_its_lease(folder: Path, times: int) -> Row:
    """The late commit is fenced; one result."""
    async with arena(folder) as it:
        it.start_worker(num_steps=40)
        await it.ready(1)
        fenced = 0
        for _ in range(times):
            await it.submit()
            frozen = it.workers[0]

            async def taken(worker=frozen) -> bool:  # type: ignore[no-untyped-def]
                return bool(await it.running_on(worker))

            await it.until(taken)
            frozen.send_signal(signal.SIGSTOP)
            it.start_worker(num_steps=40)
            await it.all_ended()
            frozen.send_signal(signal.SIGCONT)
            await asyncio.sleep(1.5)
            fenced = (await it.queue.stats())["fenced"]
            it.reap_worker(frozen)
        row = Row("SIGSTOP past the lease, CONT", times, await it.judge())
        row.demand(not await it.charged(2), "a job was not run a second time")
        row.demand(fenced >= times, f"{fenced} late writes were fenced")
        return row


async def sigterm_under_load(folder: Path, times: int) -> Row:
    """0 failed, attempts not charged, exits within its grace."""
    async with arena(folder, max_attempts=3) as it:
        for _ in range(2):
            it.start_worker(num_steps=50)
        await it.ready(2)
        load = asyncio.create_task(trickle(it, 0.1))
        row = Row("SIGTERM under load", times, limit_s=1 + 10)
        for _ in range(times):
            await asyncio.sleep(random.uniform(0.2, 0.6))
            leaving = it.workers[0]

            async def busy(worker=leaving) -> bool:  # type: ignore[no-untyped-def]
                return bool(await it.running_on(worker))

            await it.until(busy)
            it.start_worker(num_steps=50)
            started = time.monotonic()
            leaving.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(leaving.wait, 60)
            row.recovery_s.append(time.monotonic() - started)
            row.complaints += [] if code == 0 else [f"exit code {code}"]
            it.workers.remove(leaving)
        await end_tasks(load)
        await it.all_ended()
        row.verdict = await it.judge()
        row.demand(not await it.charged(1), "an attempt was charged")
        return row


async def poison_job_in_a_batch_of_eight(folder: Path, times: int) -> Row:
    """Only it is dead-lettered; 7 succeed."""
    async with arena(folder, max_attempts=3) as it:
        row = Row("poison job in a batch of 8", times)
        it.start_worker()
        await it.ready(1)
        poison = []
        for _ in range(times):
            for place in range(8):
                job_id = await it.submit("kill" if place == 3 else "a")
                poison += [job_id] if place == 3 else []
            ended = asyncio.create_task(it.all_ended())
            while not ended.done():
                for worker in [w for w in it.workers if w.poll() is not None]:
                    it.reap_worker(worker)
                    it.start_worker()
                await asyncio.sleep(0.1)
            await ended
        row.verdict = await it.judge("succeeded", "failed")
        for job_id in it.acknowledged:
            record = await it.queue.get(job_id)
            if record is None or (record.status == "failed") != (job_id in poison):
                row.complaints.append(f"{job_id}: the wrong one died")
        return row


async def cancel_racing_completion(folder: Path, times: int) -> Row:
    """One terminal status, whoever wins; the device is free within one step."""
    async with arena(folder) as it:
        it.start_worker(step_s=0.005, num_steps=4)
        await it.ready(1)
        row = Row("cancel racing completion", times)

        async def race() -> None:
            job_id = await it.submit()
            await asyncio.sleep(random.uniform(0.0, 0.12))
            await it.queue.cancel(job_id)

        for _ in range(0, times, 10):
            await asyncio.gather(*(race() for _ in range(10)))
        await it.all_ended()
        row.verdict = await it.judge("succeeded", "canceled")
        record = [await it.queue.get(job_id) for job_id in it.acknowledged]
        won = sum(each is not None and each.status == "succeeded" for each in record)
        row.demand(0 < won < times, f"{won} of {times} completions won: that was no race")
        return row


async def canceled_jobs_free_the_device(folder: Path, times: int) -> Row:
    """A step lasts 0.2 s: the next job, which needs the device alone, starts within one step."""
    step_s = 0.2
    async with arena(folder) as it:
        it.start_worker(step_s=step_s, num_steps=50, LUMINA_MAX_RUNNING="1")
        await it.ready(1)
        row = Row("cancel frees the device", times, limit_s=step_s + 0.5)
        job_id = await it.submit()
        for _ in range(times):
            await it.until(lambda job=job_id: _runs(it, job))  # type: ignore[misc]
            await asyncio.sleep(random.uniform(0.1, 0.4))
            following = await it.submit()
            await it.queue.cancel(job_id)
            row.recovery_s.append(await it.until(lambda job=following: _runs(it, job)))  # type: ignore[misc]
            job_id = following
        await it.queue.cancel(job_id)
        await it.all_ended()
        row.verdict = await it.judge("canceled")
        return row


async def _runs(it: Arena, job_id: str) -> bool:
    record = await it.queue.get(job_id)
    return record is not None and record.status == "running"
