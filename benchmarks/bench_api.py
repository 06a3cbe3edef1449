"""What API and queue add to a picture: request time minus engine time, under an even load.

`python -m benchmarks.bench_api` starts a redis-server, an API process and a worker whose engine
only waits, then sends synchronous `POST /generate` at random moments (a Poisson process, so that
nobody waits for anybody's answer) and prints what each spent outside the engine. `--write` keeps
the figures in `benchmarks/results/`. Only write on an idle machine.

The clock of a request starts when it was due, not when this process came to send it. Two figures:
`api_and_queue` is what remains of it without the worker's stages encode, denoise and decode;
`beyond_the_steps` is what remains without the steps' own length, so that the engine's loop and the
wait for the running step to end, before a newcomer joins the batch, count too. The picture is tiny.
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
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
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
ENGINE_STAGES = ("encode_s", "denoise_s", "decode_s")
TARGET_MS = 50.0


@dataclass(frozen=True)
class Sample:
    """One request: seconds from when it was due to its answer, and what the worker says of it, or
    why it was refused."""

    seconds: float
    timings: dict[str, float] = field(default_factory=dict)
    refusal: str = ""

    @property
    def api_and_queue_ms(self) -> float:
        """Milliseconds outside the engine's stages."""
        return 1000 * (self.seconds - sum(self.timings[stage] for stage in ENGINE_STAGES))

    @property
    def beyond_the_steps_ms(self) -> float:
        """Milliseconds in which no step of this request ran."""
        return 1000 * (self.seconds - ENGINE_S)

    @property
    def http_ms(self) -> float:
        """Milliseconds before the job was queued and after its picture was stored."""
        return 1000 * (self.seconds - self.timings["total_s"])


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
    """Send at `rate` for `duration_s`; returns a sample of every request, refused ones too."""

    async def one(due: float, seed: int) -> Sample:
        answer = await client.post("/generate", json={"prompt": "a red circle", "seed": seed})
        seconds = time.monotonic() - due
        if answer.status_code != 200:
            return Sample(seconds, refusal=f"{answer.status_code} {answer.json()['code']}")
        return Sample(seconds, answer.json()["timings"])

    tasks: list[asyncio.Task[Sample]] = []
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


def figures(all_samples: list[Sample], rate: float) -> dict[str, Any]:
    """Percentiles of what was spent outside the engine, and on what; refusals by their reason.

    Percentiles are those of the requests that were served: with any refusal they say little.
    """
    samples = [sample for sample in all_samples if not sample.refusal]
    refused = Counter(sample.refusal for sample in all_samples if sample.refusal)
    parts = {
        "queue": [1000 * sample.timings["queue_s"] for sample in samples],
        "store": [1000 * sample.timings["store_s"] for sample in samples],
        "http and waking": [sample.http_ms for sample in samples],
    }
    return {
        "requests": len(all_samples),
        "refused": dict(refused),
        "requests_per_s": rate,
        "engine_ms": 1000 * ENGINE_S,
        "step_ms": 1000 * STEP_S,
        "api_and_queue_ms": percentiles([sample.api_and_queue_ms for sample in samples]),
        "of_which_ms": {name: percentiles(each) for name, each in parts.items()},
        "beyond_the_steps_ms": percentiles([sample.beyond_the_steps_ms for sample in samples]),
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
    if result["refused"]:
        print(f"REFUSED, so the figures say little: {result['refused']}")
    parts = {f"  {name}": row for name, row in result["of_which_ms"].items()}
    rows = {"API and queue": result["api_and_queue_ms"], **parts}
    rows["beyond the steps"] = result["beyond_the_steps_ms"]
    print(f"{'ms':<18}" + "".join(f"{name:>9}" for name in result["api_and_queue_ms"]))
    for name, row in rows.items():
        print(f"{name:<18}" + "".join(f"{value:>9.2f}" for value in row.values()))
    print("processor time a request: " + ", ".join(f"{n} {ms} ms" for n, ms in cpu.items()))
    if options.write:
        around = surroundings() | {"cores": os.cpu_count(), "load": load_avg}
        print(write_result("bench_api", result | around))


if __name__ == "__main__":
    main()
