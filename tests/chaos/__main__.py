"""`make chaos`: the long rows of the fault table, and the table itself."""

import argparse
import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from tests.chaos import rows
from tests.chaos.rows import Row

LONG: dict[str, Callable[[Path], Awaitable[Row]]] = {
    "kill": lambda folder: rows.kill_9_a_worker_mid_batch(folder, 100),
    "stop": lambda folder: rows.sigstop_a_worker_past_its_lease(folder, 10),
    "term": lambda folder: rows.sigterm_under_load(folder, 100),
    "poison": lambda folder: rows.poison_job_in_a_batch_of_eight(folder, 5),
    "redis": lambda folder: rows.kill_9_redis(folder, 20),
    "away5": lambda folder: rows.kill_9_redis(folder, 3, away_s=5.0),
    "away60": lambda folder: rows.kill_9_redis(folder, 1, away_s=60.0),
    "power": lambda folder: rows.power_loss(folder, 5),
    "cancel": lambda folder: rows.cancel_racing_completion(folder, 1000),
    "overload": lambda folder: rows.overload_by_a_noisy_tenant(folder, 600),
}
HEAD = ("row", "jobs", "faults", "lost", "duplicate", "p50 s", "p99 s", "result")
FORMAT = "{:<32}{:>7}{:>8}{:>6}{:>11}{:>8}{:>8}  {}"


def line(row: Row) -> str:
    """One line of the table."""
    verdict = row.verdict
    shown = [f"{row.percentile(p):.2f}" if row.recovery_s else "-" for p in (0.5, 0.99)]
    told = "pass" if row.holds else f"FAIL {'; '.join(row.complaints[:3])}"
    if verdict.unexpected:
        told += f" ({len(verdict.unexpected)} unexpected)"
    return FORMAT.format(
        row.name, verdict.jobs, row.faults, len(verdict.lost), len(verdict.duplicate), *shown, told
    )


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
        with tempfile.TemporaryDirectory(prefix="lumina-chaos-") as folder:
            row = asyncio.run(LONG[name](Path(folder)))
        print(line(row), flush=True)
        held &= row.holds
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
