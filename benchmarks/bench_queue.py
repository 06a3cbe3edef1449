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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from server.embedded import EmbeddedRedis
from server.protocol import JobResult, JobSpec, StepCounts, Timings, new_job_id
from server.queue.connection import connect
from server.queue.jobs import JobQueue

RESULTS = Path(__file__).parent / "results"
POOL, WORKER = "default", "w1"
BATCH = 100
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


def submission(tenant: int) -> list[str | int]:
    """Arguments of one submit script: no limits, no deadline, no key."""
    limits = (10**9, 10**9, 0, 15_000)
    job = [new_job_id(), SPEC, f"t{tenant % 20}", POOL, "normal", 1000]
    return [*job, *limits, "", "", 3_600_000, 0, "", 0]


async def fill(queue: JobQueue, jobs: int) -> None:
    """Queue `jobs` jobs of 20 tenants, pipelined."""
    for first in range(0, jobs, BATCH):
        size = min(BATCH, jobs - first)
        await queue.run_all("submit", [submission(first + i) for i in range(size)])


async def throughput(queue: JobQueue, jobs: int) -> float:
    """Jobs a second from submission to commit: pipelined submits and commits, batched claims."""
    started = time.perf_counter()
    for _ in range(jobs // BATCH):
        await fill(queue, BATCH)
        claims = await queue.claim(WORKER, POOL, BATCH, 1e12)
        assert len(claims) == BATCH
        commits = [[*claim.fence, RESULT.to_json(), 3_600_000, 4] for claim in claims]
        assert all(await queue.run_all("complete", commits))
    return jobs / (time.perf_counter() - started)


async def call_times(queue: JobQueue) -> dict[str, list[float]]:
    """Milliseconds of each call, one after another, as a caller sees them."""
    taken: dict[str, list[float]] = {}

    async def timed(name: str, call: Any) -> Any:
        started = time.perf_counter()
        answer = await call
        taken.setdefault(name, []).append(1000 * (time.perf_counter() - started))
        return answer

    for number in range(CALLS):
        await timed("submit", queue.run("submit", *submission(number)))
        (claim,) = await timed("claim", queue.claim(WORKER, POOL, 1, 1e12))
        await timed("heartbeat", queue.heartbeat(WORKER, POOL, [claim]))
        await timed("progress", queue.progress(claim, 1, 4))
        await timed("reap", queue.reap())
        if number % 3 == 0:
            await timed("release", queue.release(claim))
            await timed("cancel", queue.run("cancel", claim.job_id, 3_600_000))
        else:
            await timed("complete", queue.complete(claim, RESULT))
    return taken


async def script_us(redis: Redis) -> dict[str, float]:
    """Redis' own microseconds per call of a script, since the last reset."""
    stats = await redis.info("commandstats")
    return {
        name.removeprefix("cmdstat_"): values["usec_per_call"]
        for name, values in stats.items()
        if name in ("cmdstat_evalsha", "cmdstat_hgetall")
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(url: str, jobs: int) -> dict[str, Any]:
    """All figures on one fresh Redis."""
    queue = JobQueue(connect(url))
    try:
        await throughput(queue, BATCH)
        rates = [await throughput(queue, jobs // 5) for _ in range(5)]
        figures: dict[str, Any] = {"jobs_per_s": round(statistics.median(rates))}
        for depth in DEPTHS:
            await fill(queue, depth - await queue.depth())
            await queue.redis.config_resetstat()
            taken = await call_times(queue)
            figures[f"depth_{depth}"] = {
                "p50_ms": {name: round(percentile(v, 0.5), 3) for name, v in taken.items()},
                "p99_ms": {name: round(percentile(v, 0.99), 3) for name, v in taken.items()},
                "redis_us_per_call": await script_us(queue.redis),
            }
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
    small, large = (figures[f"depth_{depth}"]["p99_ms"] for depth in DEPTHS)
    print(f"{'p99 ms':<12}" + "".join(f"{depth:>10} queued" for depth in DEPTHS))
    for name in small:
        print(f"{name:<12}{small[name]:>17.2f}{large[name]:>17.2f}")
    for depth in DEPTHS:
        own = figures[f"depth_{depth}"]["redis_us_per_call"]
        print(f"Redis' own us per call at {depth} queued: {own}")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(figures | around, indent=2)
        (RESULTS / "bench_queue.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
