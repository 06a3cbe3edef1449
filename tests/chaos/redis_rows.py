"""Rows of the fault table about Redis: killed, away, cut, flushed, full, and wrong clocks."""

import asyncio
import time
from pathlib import Path

from server.errors import QueueFull, QueueUnavailable
from server.protocol import JobSpec, new_job_id
from server.queue.connection import end_tasks
from tests.chaos.arena import Arena, arena, trickle
from tests.chaos.table import Row


async def kill_9_redis(
    folder: Path, times: int, away_s: float = 0.5, fsync: str = "everysec"
) -> Row:
    """0 acknowledged lost; workers resume within 10 s without a restart."""
    async with arena(folder, fsync=fsync) as it:
        for _ in range(2):
            it.start_worker()
        await it.ready(2)
        pids = [worker.pid for worker in it.workers]
        name = f"kill -9 Redis ({fsync}), away {away_s:g} s"
        row = Row(name, times, limit_s=10.0)
        for _ in range(times):
            load = asyncio.create_task(trickle(it, 0.02))
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
        row.verdict = await it.judge()
        if [worker.pid for worker in it.workers if worker.poll() is None] != pids:
            row.complaints.append("a worker did not live through it")
        return row


async def power_loss(folder: Path, times: int) -> Row:
    """An append-only file cut by its last 2 s loses at most those, and the epoch reports it."""
    row = Row("AOF cut by its last 2 s", times)
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


async def flushall(folder: Path, times: int) -> Row:
    """The loss raises the alarm, nothing loops hotly, and work goes on once it is accepted."""
    row = Row("FLUSHALL", times, limit_s=10.0)
    async with arena(folder) as it:
        for _ in range(2):
            it.start_worker()
        await it.ready(2)
        for _ in range(times):
            for _ in range(20):
                await it.submit()
            await it.queue.reap()
            await it.queue.redis.flushall()
            it.acknowledged.clear()  # that they are gone is what the alarm says
            row.recovery_s.append(await it.until(lambda: _alarmed(it)))
            await asyncio.sleep(1.0)
            before = await _commands(it)
            await asyncio.sleep(3.0)
            pace = (await _commands(it) - before) / 3
            row.demand(pace < 100, f"{pace:.0f} commands a second while nothing happens")
            await it.queue.accept_epoch()
            await it.ready(2)
            for _ in range(20):
                await it.submit()
            await it.all_ended()
            row.verdict.jobs += len(it.acknowledged)
            verdict = await it.judge()
            row.demand(verdict.holds, "work did not go on")
            await it.until(lambda: _calm(it))
    return row


async def _alarmed(it: Arena) -> bool:
    await it.queue.reap()
    return bool(it.queue.data_lost)


async def _calm(it: Arena) -> bool:
    return not await _alarmed(it)


async def _commands(it: Arena) -> int:
    return int((await it.queue.ask(it.queue.redis.info("stats")))["total_commands_processed"])


async def script_flush(folder: Path, times: int) -> Row:
    """Nobody notices."""
    async with arena(folder, max_attempts=3) as it:
        for _ in range(2):
            it.start_worker()
        await it.ready(2)
        row = Row("SCRIPT FLUSH", times)
        load = asyncio.create_task(trickle(it, 0.02))
        for _ in range(times):
            await asyncio.sleep(0.1)
            await it.queue.redis.script_flush()
        await end_tasks(load)
        await it.all_ended()
        row.verdict = await it.judge()
        row.demand(not await it.charged(1), "an attempt was charged")
        return row


async def clocks_ten_minutes_wrong(folder: Path, times: int) -> Row:
    """One worker's clock is ahead, one's behind: no early reclaim, and deadlines are Redis's."""
    async with arena(folder, max_attempts=3) as it:
        for ahead_s in (600.0, -600.0):
            it.start_worker(num_steps=150, clock_s=ahead_s)  # three seconds: longer than a lease
        await it.ready(2)
        row = Row("client clock +-10 min", times, limit_s=1.0)
        lasting = [await it.submit(deadline_s=600.0, cost_ms=1) for _ in range(8)]
        late = []
        for _ in range(times):
            late.append(await it.submit("late", deadline_s=1.0, cost_ms=1))
            await asyncio.sleep(0.2)
        await it.all_ended()
        row.verdict = await it.judge("succeeded", "expired")
        for job_id in it.acknowledged:
            record = await it.queue.get(job_id)
            assert record is not None
            expected = "expired" if job_id in late else "succeeded"
            row.demand(record.status == expected, f"{job_id} {record.status}, not {expected}")
            if job_id in late and record.finished_ms and record.deadline_ms:
                row.recovery_s.append((record.finished_ms - record.deadline_ms) / 1000)
        row.demand(min(row.recovery_s) >= 0, "a job expired before its deadline")
        row.demand((await it.queue.stats())["reclaimed"] == 0, "a lease was taken early")
        row.demand(len(lasting) == 8, "the load was not there")
        return row


async def redis_at_maxmemory(folder: Path, times: int) -> Row:
    """New work is refused; what runs keeps its leases and commits, what waits gets done."""
    async with arena(folder, max_attempts=3) as it:
        for _ in range(2):
            it.start_worker(num_steps=150)  # three seconds: longer than a lease
        await it.ready(2)
        row = Row("Redis at maxmemory", times)
        for _ in range(times):
            for _ in range(30):
                await it.submit()
            await it.queue.redis.config_set("maxmemory", 1)
            await it.queue.memory_ratio(0.0)  # as upkeep does every second
            for _ in range(10):
                try:
                    await it.queue.submit(new_job_id(), JobSpec(prompt="a", seed=1))
                    row.complaints.append("a submission was taken")
                except (QueueFull, QueueUnavailable):
                    await asyncio.sleep(0.1)
            await it.all_ended()  # still full
            await it.queue.redis.config_set("maxmemory", 0)
            await it.queue.memory_ratio(0.0)
        row.verdict = await it.judge()
        row.demand(not await it.charged(1), "an attempt was charged")
        return row
