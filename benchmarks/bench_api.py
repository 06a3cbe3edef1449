"""What API and queue add to a picture: request time minus engine time, under an even load.

`python -m benchmarks.bench_api` starts a redis-server, an API process and a worker whose engine
only waits, then sends synchronous `POST /generate` at random moments (a Poisson process, so that
nobody waits for anybody's answer) and prints what each spent outside the engine. `--write` keeps
the figures in `benchmarks/results/`. Only write on an idle machine.

The clock of a request starts when it was due, not when this process came to send it. The engine's
time is its steps times their length and nothing else: waiting for the running step to end before
joining the batch, drawing, encoding and storing the (tiny) picture count as overhead.
"""

import argparse
import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.bench_queue import percentile
from benchmarks.report import surroundings, write_result
from server.embedded import EmbeddedRedis

STEP_S, NUM_STEPS = 0.01, 20
ENGINE_S = STEP_S * NUM_STEPS
RATE = 20.0
WARM_UP_S = 3.0
READY_S = 120.0
STAGES = ("queue_s", "encode_s", "denoise_s", "decode_s", "store_s")
TARGET_MS = 50.0


@dataclass(frozen=True)
class Sample:
    """One request: seconds from when it was due to its answer, and what the worker says of it."""

    due_s: float
    seconds: float
    timings: dict[str, float]

    @property
    def overhead_ms(self) -> float:
        """Milliseconds outside the engine."""
        return 1000 * (self.seconds - ENGINE_S)


@contextlib.contextmanager
def service(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Redis, an API process and a worker that only waits; yields the URL of the API, and pids."""
    redis = EmbeddedRedis(folder)
    redis.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"LUMINA_REDIS_URL": redis.url, "LUMINA_DATA_DIR": str(folder)}
    environment = os.environ | settings | {"LUMINA_LOG_LEVEL": "error"}
    commands = {
        "worker": ["-m", "tests.fakes", str(STEP_S), str(NUM_STEPS)],
        "api": ["-m", "server.cli", "api", "--port", str(port), "--needs-model"],
    }
    started = {
        name: subprocess.Popen([sys.executable, *argv], env=environment)
        for name, argv in commands.items()
    }
    try:
        yield f"http://127.0.0.1:{port}", {name: each.pid for name, each in started.items()}
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(30)
        redis.stop()


async def until_ready(client: httpx.AsyncClient) -> None:
    """Return once the service has a model; raises RuntimeError if it never does."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the service was not ready within {READY_S:g} s")


async def arrivals(rate: float, duration_s: float, seed: int) -> AsyncIterator[float]:
    """The moments, in monotonic seconds, at which requests of a Poisson process are due."""
    rng = random.Random(seed)
    due = started = time.monotonic()
    while True:
        due += rng.expovariate(rate)
        if due > started + duration_s:
            return
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield due


async def load(client: httpx.AsyncClient, rate: float, duration_s: float) -> list[Sample]:
    """Send at `rate` for `duration_s`; returns all samples, raises on an answer that is not 200."""
    started = time.monotonic()

    async def one(due: float, seed: int) -> Sample:
        answer = await client.post("/generate", json={"prompt": "a red circle", "seed": seed})
        seconds = time.monotonic() - due
        answer.raise_for_status()
        assert answer.status_code == 200, answer.text
        return Sample(due - started, seconds, answer.json()["timings"])

    tasks = []
    async for due in arrivals(rate, duration_s, seed=7):
        tasks.append(asyncio.create_task(one(due, len(tasks))))
    return await asyncio.gather(*tasks)


def cpu_s(pid: int) -> float:
    """Processor seconds that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(
    url: str, pids: dict[str, int], rate: float, duration_s: float
) -> tuple[list[Sample], dict[str, float]]:
    """Warm up, then load; only the second part counts.

    Returns the samples and the processor time of each process for a request, in ms, which others'
    load on the machine hardly changes.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with httpx.AsyncClient(
        base_url=url, timeout=60, limits=limits, trust_env=False
    ) as client:
        await until_ready(client)
        await load(client, rate, WARM_UP_S)
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        samples = await load(client, rate, duration_s)
        used = {name: 1000 * (cpu_s(pid) - before[name]) for name, pid in pids.items()}
        return samples, {name: round(ms / len(samples), 2) for name, ms in used.items()}


def figures(samples: list[Sample], rate: float) -> dict[str, Any]:
    """Percentiles of the overhead, and of what the worker's own clock says of each stage."""
    overhead = [sample.overhead_ms for sample in samples]
    parts = {stage: [1000 * s.timings[stage] for s in samples] for stage in STAGES}
    parts["denoise_s"] = [each - 1000 * ENGINE_S for each in parts["denoise_s"]]
    inside = [1000 * (s.timings["total_s"] - ENGINE_S) for s in samples]
    parts["http and waking"] = [a - b for a, b in zip(overhead, inside, strict=True)]
    return {
        "requests": len(samples),
        "requests_per_s": rate,
        "engine_ms": 1000 * ENGINE_S,
        "step_ms": 1000 * STEP_S,
        "overhead_ms": percentiles(overhead),
        "of_which_ms": {name.removesuffix("_s"): percentiles(each) for name, each in parts.items()},
        "target_p99_ms": TARGET_MS,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest."""
    named = {f"p{share}": percentile(values, share / 100) for share in (50, 95, 99)}
    return {name: round(value, 2) for name, value in (named | {"max": max(values)}).items()}


def main() -> None:
    """Measure, print and, with --write, keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as (url, pids):
        measuring = measure(url, pids, options.rate, options.seconds)
        samples, cpu = asyncio.run(measuring)
    result = figures(samples, options.rate) | {"cpu_ms_per_request": cpu}
    load_avg = {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)}
    print(
        f"{result['requests']} requests at {options.rate:g}/s, engine {1000 * ENGINE_S:g} ms "
        f"(load before {load_avg['before']}, after {load_avg['after']})"
    )
    rows = {"overhead": result["overhead_ms"], **result["of_which_ms"]}
    print(f"{'ms':<18}" + "".join(f"{name:>9}" for name in result["overhead_ms"]))
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{value:>9.2f}" for value in row.values()))
    print("processor time a request: " + ", ".join(f"{n} {ms} ms" for n, ms in cpu.items()))
    if options.write:
        around = surroundings() | {"cores": os.cpu_count(), "load": load_avg}
        print(write_result("bench_api", result | around))


if __name__ == "__main__":
    main()
