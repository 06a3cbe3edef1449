"""The rows of the fault table, each a function of how often to hurt. All use waiting engines."""

import asyncio
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from server.queue.connection import end_tasks
from tests.chaos.arena import LEASE_S, Arena, arena
from tests.chaos.history import Verdict, judge, queued_ms


@dataclass
class Row:
    """One line of the table. `recovery_s` holds one value per job or fault that had to recover."""

    name: str
    faults: int
    verdict: Verdict
    recovery_s: list[float] = field(default_factory=list)
    limit_s: float | None = None
    complaints: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        values = sorted(self.recovery_s)
        return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0

    @property
    def holds(self) -> bool:
        slow = self.limit_s is not None and self.percentile(0.99) > self.limit_s
        return self.verdict.holds and not slow and not self.complaints


async def _trickle(it: Arena, pause_s: float, **options: object) -> None:
    while True:
        await it.submit(**options)
        await asyncio.sleep(pause_s)


async def _recoveries(it: Arena, lost: list[tuple[str, float]]) -> list[float]:
    """Seconds from each fault until each job it hit was taken back."""
    found = []
    for job_id, at in lost:
        later = [ms / 1000 - at for ms in await queued_ms(it.queue, job_id) if ms / 1000 > at]
        found += later[:1]
    return found


async def kill_9_a_worker_mid_batch(folder: Path, times: int) -> Row:
    """0 lost, 0 duplicate; reclaimed within lease + 5 s at p99."""
    async with arena(folder) as it:
        for _ in range(3):
            it.start_worker()
        await it.ready(3)
        load = asyncio.create_task(_trickle(it, 0.1))
        hit: list[tuple[str, float]] = []
        for _ in range(times):
            await asyncio.sleep(random.uniform(0.3, 0.8))
            victim = random.choice(it.workers)
            hit += [(job_id, time.time()) for job_id in await it.running_on(victim)]
            it.reap_worker(victim)
            it.start_worker()
        await end_tasks(load)
        await it.all_ended()
        row = Row("kill -9 a worker mid-batch", times, await judge(it.queue, it.acknowledged))
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
        row = Row("SIGSTOP past the lease, CONT", times, await judge(it.queue, it.acknowledged))
        for job_id in it.acknowledged:
            record = await it.queue.get(job_id)
            if record is None or record.attempts != 2:
                row.complaints.append(f"{job_id}: was not run a second time")
        row.complaints += [] if fenced <= times else [f"{fenced} writes fenced"]
        return row


async def sigterm_under_load(folder: Path, times: int) -> Row:
    """0 failed, attempts not charged, exits within its grace."""
    async with arena(folder, max_attempts=3) as it:
        for _ in range(2):
            it.start_worker(num_steps=50)
        await it.ready(2)
        load = asyncio.create_task(_trickle(it, 0.1))
        row = Row("SIGTERM under load", times, Verdict(), limit_s=1 + 10)
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
        row.verdict = await judge(it.queue, it.acknowledged)
        for job_id in it.acknowledged:
            record = await it.queue.get(job_id)
            if record is None or record.attempts != 1:
                row.complaints.append(f"{job_id}: an attempt was charged")
        return row


async def poison_job_in_a_batch_of_eight(folder: Path, times: int) -> Row:
    """Only it is dead-lettered; 7 succeed."""
    async with arena(folder, max_attempts=3) as it:
        row = Row("poison job in a batch of 8", times, Verdict())
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
        row.verdict = await judge(it.queue, it.acknowledged, ("succeeded", "failed"))
        for job_id in it.acknowledged:
            record = await it.queue.get(job_id)
            if record is None or (record.status == "failed") != (job_id in poison):
                row.complaints.append(f"{job_id}: the wrong one died")
        return row


async def kill_9_redis(folder: Path, times: int, away_s: float = 0.5) -> Row:
    """0 acknowledged lost; workers resume within 10 s without a restart."""
    async with arena(folder) as it:
        for _ in range(2):
            it.start_worker()
        await it.ready(2)
        pids = [worker.pid for worker in it.workers]
        name = f"kill -9 Redis, away {away_s:g} s"
        row = Row(name, times, Verdict(), limit_s=10.0)
        for _ in range(times):
            load = asyncio.create_task(_trickle(it, 0.02))
            await asyncio.sleep(1.0)
            await end_tasks(load)
            it.kill_redis()
            await asyncio.sleep(away_s)
            it.redis.start()
            probe = await it.submit()

            async def done(job_id=probe) -> bool:  # type: ignore[no-untyped-def]
                record = await it.queue.get(job_id)
                return record is not None and record.finished

            row.recovery_s.append(await it.until(done))
        await it.all_ended()
        row.verdict = await judge(it.queue, it.acknowledged)
        if [worker.pid for worker in it.workers if worker.poll() is None] != pids:
            row.complaints.append("a worker did not live through it")
        return row


async def power_loss(folder: Path, times: int) -> Row:
    """An append-only file cut by its last 2 s loses at most those, and the epoch reports it."""
    row = Row("AOF cut by its last 2 s", times, Verdict())
    for number in range(times):
        async with arena(folder / str(number)) as it:
            aof = folder / str(number) / "redis" / "appendonly.aof"
            submitted: list[tuple[str, float]] = []
            sizes: list[tuple[float, int]] = []
            ends = time.monotonic() + 4.0
            while time.monotonic() < ends:
                submitted.append((await it.submit(), time.monotonic()))
                sizes.append((time.monotonic(), aof.stat().st_size))
                await it.queue.reap()
                await asyncio.sleep(0.02)
            it.kill_redis()
            cut = next(size for at, size in sizes if at >= ends - 2.0)
            with aof.open("r+b") as file:
                file.truncate(cut)
            it.redis.start()
            await it.until(lambda: _answers(it))
            if not it.queue.data_lost:
                row.complaints.append("the loss was not reported")
            row.verdict.jobs += len(submitted)
            for job_id, at in submitted:
                if at < ends - 2.2 and await it.queue.get(job_id) is None:
                    row.verdict.lost.append(job_id)
    return row


async def _answers(it: Arena) -> bool:
    await it.queue.reap()
    return True


async def cancel_racing_completion(folder: Path, times: int) -> Row:
    """One terminal status, whoever wins."""
    async with arena(folder) as it:
        it.start_worker(step_s=0.005, num_steps=4)
        await it.ready(1)
        row = Row("cancel racing completion", times, Verdict())

        async def race() -> None:
            job_id = await it.submit()
            await asyncio.sleep(random.uniform(0.0, 0.12))
            await it.queue.cancel(job_id)

        for _ in range(0, times, 10):
            await asyncio.gather(*(race() for _ in range(10)))
        await it.all_ended()
        row.verdict = await judge(it.queue, it.acknowledged, ("succeeded", "canceled"))
        return row


async def _keep_noisy(it: Arena, depth: int) -> None:
    """Refill the noisy tenant's backlog to `depth` jobs, for ever: however fast the machine is."""
    while True:
        for _ in range(depth - await it.queue.depth()):
            await it.submit(tenant="noisy", cost_ms=100)
        await asyncio.sleep(0.2)


async def overload_by_a_noisy_tenant(folder: Path, times: int) -> Row:
    """A quiet tenant waits about as long as without the noise, and one mean job more."""
    async with arena(folder) as it:
        it.start_worker(step_s=0.01, num_steps=10)
        await it.ready(1)
        row = Row("1 noisy tenant among 50", times, Verdict())

        quiet = min(49, times // 3)

        async def quiet_jobs() -> tuple[list[float], float]:
            """How long each waited in the queue, and the mean length of a job, in seconds."""
            waits, lengths = [], []
            for number in range(quiet):
                job_id = await it.submit(tenant=f"quiet{number}", cost_ms=100)
                record = await it.queue.wait(job_id, 60)
                started_ms = record.started_ms or 0
                waits.append((started_ms - record.submitted_ms) / 1000)
                lengths.append(((record.finished_ms or 0) - started_ms) / 1000)
            return waits, sum(lengths) / len(lengths)

        unloaded, _ = await quiet_jobs()
        for _ in range(times):
            await it.submit(tenant="noisy", cost_ms=100)
        noise = asyncio.create_task(_keep_noisy(it, times))
        row.recovery_s, mean_s = await quiet_jobs()
        if not await it.queue.depth():
            row.complaints.append("the noise was over too soon")
        noise.cancel()
        await asyncio.wait([noise])
        at = int(0.95 * quiet)
        allowed, got = sorted(unloaded)[at] + mean_s, row.percentile(0.95)
        if got > allowed:
            row.complaints.append(f"p95 {got:.2f} s, allowed {allowed:.2f} s")
        await it.all_ended()
        row.verdict = await judge(it.queue, it.acknowledged)
        return row
