"""FIFO, round-robin and the chosen policy on seeded traffic, through the real scheduler.

`python -m benchmarks.bench_scheduler` replays traces in simulated time with
`server.scheduler.simulate`: the 2.6B model on one H200 under a mixture of sizes at two loads, and
the demo checkpoint on a CPU.
It prints tables and writes them to `benchmarks/results/scheduler.md` and `scheduler.json`. The
figures depend on the seeds alone, not on the machine.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from server.scheduler.policy import EarliestDue, Policy
from server.scheduler.simulate import (
    DEMO_CPU,
    DEMO_MIX,
    H200,
    MIX,
    Device,
    Outcome,
    Replay,
    RoundRobin,
    RunToCompletion,
    Summary,
    make_trace,
)

RESULTS = Path(__file__).parent / "results"
NUM_JOBS, SEEDS = 2000, (1, 2, 3, 4, 5)
POLICIES: dict[str, Callable[[], Policy]] = {
    "FIFO, run to completion": RunToCompletion,
    "step round-robin": RoundRobin,
    "earliest due (ours)": EarliestDue,
}
SCENARIOS: dict[str, tuple[Device, dict[int, float], float]] = {
    "2.6B on one H200, load 0.8": (H200, MIX, 0.8),
    "2.6B on one H200, load 0.95": (H200, MIX, 0.95),
    "demo checkpoint on a CPU core, load 0.8": (DEMO_CPU, DEMO_MIX, 0.8),
}
SMALL = 512


def replay(name: str, policy: str, seeds: tuple[int, ...], num_jobs: int) -> list[Outcome]:
    """Outcomes of one policy under one scenario, all seeds together."""
    device, mix, load = SCENARIOS[name]
    outcomes = []
    for seed in seeds:
        trace = make_trace(seed=seed, num_jobs=num_jobs, load=load, device=device, mix=mix)
        outcomes += Replay(trace, POLICIES[policy](), device).run()
    return outcomes


def row(outcomes: list[Outcome], sizes: list[int]) -> dict[str, float]:
    """The figures of one line."""
    everybody = Summary.of(outcomes)
    limit = SMALL if SMALL in sizes else sizes[0]
    small = Summary.of(outcomes, lambda size: size <= limit)
    largest = Summary.of(outcomes, lambda size: size == sizes[-1])
    within = sum(outcome.stretch <= 5 for outcome in outcomes) / len(outcomes)
    return {
        "p50_s": everybody.p50_s,
        "p99_s": everybody.p99_s,
        "small_p99_s": small.p99_s,
        "small_p99_of_solo": small.stretch_p99,
        "largest_p99_s": largest.p99_s,
        "within_5x_solo": within,
    }


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Markdown of one scenario."""
    lines = [
        "| policy | p50, s | p99, s | small p99, s | small p99 / solo | largest p99, s "
        "| within 5x solo |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy, r in rows.items():
        lines.append(
            f"| {policy} | {r['p50_s']:.2f} | {r['p99_s']:.1f} | {r['small_p99_s']:.2f} "
            f"| {r['small_p99_of_solo']:.2f} | {r['largest_p99_s']:.1f} "
            f"| {100 * r['within_5x_solo']:.0f} % |"
        )
    return lines


def main() -> None:
    """Replay, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=NUM_JOBS, help="jobs per trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    lines = [
        "# Who steps together: policies compared in simulated time",
        "",
        "`make bench-scheduler` writes this page. Poisson arrivals; 100 text tokens; 50 steps, the "
        "first 12 guided; "
        f"{len(given.seeds)} traces of {given.jobs} jobs. Small: up to 512 px (on the CPU: 64 px). "
        "Largest: 1536 px (128 px). Solo: the time a job takes alone.",
    ]
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name, (_, mix, _) in SCENARIOS.items():
        sizes = sorted(mix)
        report[name] = {
            policy: row(replay(name, policy, tuple(given.seeds), given.jobs), sizes)
            for policy in POLICIES
        }
        part = [f"\n## {name}", "", *table(report[name])]
        print("\n".join(part), flush=True)
        lines += part
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scheduler.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    setting = {"jobs": given.jobs, "seeds": given.seeds, "scenarios": report}
    (RESULTS / "scheduler.json").write_text(json.dumps(setting, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
