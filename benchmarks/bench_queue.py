"""The queue alone: jobs a second through submit, claim and complete, and what each call costs.

`python -m benchmarks.bench_queue` starts a redis-server of its own (append-only file, everysec) and
prints a table; `--write` keeps the figures in `benchmarks/results/`. Only write on an idle machine.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from server.embedded import EmbeddedRedis
from server.protocol import JobError, JobResult, JobSpec, StepCounts, Timings, new_job_id
from server.queue.connection import connect
from server.queue.jobs import Claim, JobQueue

RESULTS = Path(__file__).parent / "results"
POOL, WORKER = "default", "w1"
BATCH = 100
LANES = 4
DEPTHS = (100, 100_000)
CALLS = 300
SPEC = JobSpec(prompt="a red circle above a blue square", seed=7).to_json()
RESULT = JobResult(
    images=(),
    timings=Timings(queue_s=0, encode_s=0, denoise_s=0, decode_s=0, store_s=0, total_s=0),
    steps=StepCounts(computed=4, skipped=0, cfg=4),
    warnings=(),
    model="none",
)


def submission(tenant: int, pool: str = POOL) -> list[str | int]:
    """Arguments of one submit script: no limits, no deadline, no key."""
    limits = (10**9, 10**9, 0, 15_000)
    job = [new_job_id(), SPEC, f"t{tenant % 20}", pool, "normal", 1000]
    return [*job, *limits, "", "", 3_600_000, 0, "", 0, "", 1]


async def fill(queue: JobQueue, jobs: int, pool: str = POOL) -> None:
    """Queue `jobs` jobs of 20 tenants, pipelined."""
    for first in range(0, jobs, BATCH):
        size = min(BATCH, jobs - first)
        await queue.run_all("submit", [submission(first + i, pool) for i in range(size)])


async def throughput(queue: JobQueue, jobs: int) -> float:
    """Jobs a second from submission to commit: pipelined submits and commits, batched claims.

    Several lanes, each in a pool of its own, so that Redis works while the client does.
    """

    async def lane(pool: str) -> None:
        for _ in range(jobs // BATCH // LANES):
            await fill(queue, BATCH, pool)
            claims = await queue.claim(WORKER, pool, BATCH, 1e12)
            assert len(claims) == BATCH
            commits = [[*claim.fence, RESULT.to_json(), 3_600_000, 4] for claim in claims]
            assert all(await queue.run_all("complete", commits))

    started = time.perf_counter()
    await asyncio.gather(*(lane(f"lane{number}") for number in range(LANES)))
    return jobs / (time.perf_counter() - started)


async def calls(queue: JobQueue, number: int = CALLS) -> AsyncIterator[tuple[str, list[Any]]]:
    """Every script in turn, `number` calls of each; the queue is as long afterwards as before."""
    reasons = JobError(code="internal", detail="measured")
    yield "submit", [partial(queue.run, "submit", *submission(i)) for i in range(number)]
    claims: list[Claim] = []

    async def claim() -> None:
        claims.extend(await queue.claim(WORKER, POOL, 1, 1e12))

    yield "claim", [claim] * number
    yield "heartbeat", [partial(queue.heartbeat, WORKER, POOL, [each]) for each in claims]
    yield "progress", [partial(queue.progress, each, 1, 4) for each in claims]
    third = len(claims) // 3
    yield "complete", [partial(queue.complete, each, RESULT) for each in claims[:third]]
    yield "fail", [partial(queue.fail, each, reasons, False) for each in claims[third : 2 * third]]
    held = claims[2 * third :]
    yield "release", [partial(queue.release, each) for each in held]
    yield "cancel", [partial(queue.run, "cancel", each.job_id, 3_600_000) for each in held]
    yield "reap", [queue.reap] * number


async def cost_of_calls(queue: JobQueue, number: int = CALLS) -> dict[str, dict[str, float]]:
    """What each script costs by name: p50 and p99 in ms as a caller sees them, one after another,
    and Redis' own microseconds (`INFO commandstats`), which a busy machine stretches little."""
    costs = {}
    async for name, some in calls(queue, number):
        await queue.redis.config_resetstat()
        taken = []
        for call in some:
            started = time.perf_counter()
            await call()
            taken.append(1000 * (time.perf_counter() - started))
        own = (await queue.redis.info("commandstats"))["cmdstat_evalsha"]["usec_per_call"]
        costs[name] = {
            "p50_ms": round(percentile(taken, 0.5), 3),
            "p99_ms": round(percentile(taken, 0.99), 3),
            "redis_us": own,
        }
    return costs


async def redis_us_per_job(queue: JobQueue, jobs: int = 1200) -> float:
    """Redis' own microseconds for a job from submission to commit, pipelined and batched."""
    await queue.redis.config_resetstat()
    await throughput(queue, jobs)
    stats = await queue.redis.info("commandstats")
    return float(stats["cmdstat_evalsha"]["usec"]) / jobs


async def cpu_us_per_job(queue: JobQueue, jobs: int) -> dict[str, float]:
    """Processor time of a job in Redis and in the client, which others' load hardly changes: each
    has a core of its own, so the larger bounds the rate."""

    async def redis_s() -> float:
        used = await queue.redis.info("cpu")
        return float(used["used_cpu_user"] + used["used_cpu_sys"])

    redis, client = await redis_s(), time.process_time()
    await throughput(queue, jobs)
    return {
        "redis": round(1e6 * (await redis_s() - redis) / jobs, 1),
        "client": round(1e6 * (time.process_time() - client) / jobs, 1),
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(url: str, jobs: int) -> dict[str, Any]:
    """All figures on one fresh Redis."""
    queue = JobQueue(connect(url))
    try:
        await throughput(queue, LANES * BATCH)
        rates = [await throughput(queue, jobs // 5) for _ in range(5)]
        figures: dict[str, Any] = {
            "jobs_per_s": round(statistics.median(rates)),
            "redis_us_per_job": round(await redis_us_per_job(queue), 1),
            "cpu_us_per_job": await cpu_us_per_job(queue, jobs // 2),
        }
        for depth in DEPTHS:
            await fill(queue, depth - await queue.depth())
            figures[f"depth_{depth}"] = await cost_of_calls(queue)
        figures["redis"] = (await queue.redis.info("server"))["redis_version"]
        return figures
    finally:
        await queue.close()


def surroundings() -> dict[str, Any]:
    """Hardware, versions, revision and how busy the machine was."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"redis-py": version("redis"), "python": platform.python_version()},
        "git_revision": git.stdout.strip() or "unknown",
    }


def main() -> None:
    """Measure, print and, with --write, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    options = parser.parse_args()
    around = surroundings()
    with tempfile.TemporaryDirectory() as folder:
        redis = EmbeddedRedis(Path(folder))
        redis.start()
        try:
            figures = asyncio.run(measure(redis.url, options.jobs))
        finally:
            redis.stop()
    rate, load = figures["jobs_per_s"], around["load_before"]
    print(f"submit + claim + complete: {rate} jobs/s (load before: {load})")
    cpu = figures["cpu_us_per_job"]
    print(f"Redis' own time: {figures['redis_us_per_job']} us a job")
    print(f"processor time a job: Redis {cpu['redis']} us, client {cpu['client']} us")
    head = ("p50 ms", "p99 ms", "Redis us")
    print(f"{'':<12}" + "".join(f"{f'{depth} queued':>36}" for depth in DEPTHS))
    print(f"{'script':<12}" + "".join(f"{name:>12}" for name in head * len(DEPTHS)))
    for name in figures[f"depth_{DEPTHS[0]}"]:
        rows = [figures[f"depth_{depth}"][name] for depth in DEPTHS]
        print(f"{name:<12}" + "".join(f"{value:>12.2f}" for row in rows for value in row.values()))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(figures | around, indent=2)
        (RESULTS / "bench_queue.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
