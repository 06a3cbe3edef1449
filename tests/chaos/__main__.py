"""`make chaos`: the long rows of the fault table, and the table itself."""

import argparse
import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from tests.chaos import (
    edge_rows,
    fuzz_row,
    load_rows,
    model_row,
    real_rows,
    redis_rows,
    worker_rows,
)
from tests.chaos.table import FORMAT, HEAD, Row, line

LONG: dict[str, Callable[[Path], Awaitable[Row]]] = {
    "kill": lambda folder: worker_rows.kill_9_a_worker_mid_batch(folder, 100),
    "kill-real": lambda folder: real_rows.kill_9_a_worker(folder, 10),
    "stop": lambda folder: worker_rows.sigstop_a_worker_past_its_lease(folder, 10),
    "term": lambda folder: worker_rows.sigterm_under_load(folder, 100),
    "term-real": lambda folder: real_rows.sigterm_a_worker(folder, 3),
    "poison": lambda folder: worker_rows.poison_job_in_a_batch_of_eight(folder, 5),
    "redis": lambda folder: redis_rows.kill_9_redis(folder, 20),
    "redis-always": lambda folder: redis_rows.kill_9_redis(folder, 20, fsync="always"),
    "redis-real": lambda folder: real_rows.kill_9_redis_of_serve(folder, 3),
    "away5": lambda folder: redis_rows.kill_9_redis(folder, 3, away_s=5.0),
    "away60": lambda folder: redis_rows.kill_9_redis(folder, 1, away_s=60.0),
    "power": lambda folder: redis_rows.power_loss(folder, 5),
    "flushall": lambda folder: redis_rows.flushall(folder, 3),
    "script-flush": lambda folder: redis_rows.script_flush(folder, 50),
    "network": lambda folder: edge_rows.bad_network(folder, 9),
    "clock": lambda folder: redis_rows.clocks_ten_minutes_wrong(folder, 20),
    "blobs": lambda folder: edge_rows.blob_store_failing(folder, 10),
    "maxmemory": lambda folder: redis_rows.redis_at_maxmemory(folder, 3),
    "reader": lambda folder: edge_rows.reader_killed_mid_stream(folder, 5),
    "overload": lambda folder: load_rows.overload_by_a_noisy_tenant(folder, 50),
    "overload-real": lambda folder: real_rows.overload(folder, 12),
    "cancel": lambda folder: worker_rows.cancel_racing_completion(folder, 1000),
    "cancel-step": lambda folder: worker_rows.canceled_jobs_free_the_device(folder, 20),
    "cancel-real": lambda folder: real_rows.cancel_racing_completion(folder, 20),
    "machine": lambda _: model_row.state_machine(10_000),
    "fuzz": lambda folder: fuzz_row.fuzzed_requests(folder, 4),
    "soak": lambda folder: load_rows.soak(folder, 100),
}


def run(name: str, folder: Path) -> Row:
    """Run a row; one that does not come to its end does not hold, and stops no other."""
    try:
        return asyncio.run(LONG[name](folder))
    except Exception as error:
        return Row(name, 0, complaints=[f"{type(error).__name__}: {error}"])


def main() -> int:
    """Run the rows asked for (all by default); 1 if any does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(LONG)}")
    chosen = parser.parse_args().rows or list(LONG)
    unknown = set(chosen) - set(LONG)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    quiet = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=quiet)  # the table is the report
    print(FORMAT.format(*HEAD), flush=True)
    held = True
    for name in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lumina-chaos-") as folder:
            row = run(name, Path(folder))
        print(line(row, time.monotonic() - began), flush=True)
        held &= row.holds
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
