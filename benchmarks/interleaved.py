"""Sides measured in turns (A B B A) in one process, and what comes of it. Needs only Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


def measure(
    sides: dict[str, Callable[[int], Any]], rounds: int, warm_up: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the clock and of the processor for every call, the sides taking turns.

    Each call gets a number of its own.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    number = 0
    for index in range(warm_up + rounds):
        for name in [*sides, *reversed(sides)]:
            number += 1
            started, worked = time.perf_counter(), time.process_time()
            sides[name](1000 * number)
            if index >= warm_up:
                seconds = time.perf_counter() - started, time.process_time() - worked
                taken[name].append(seconds)
    return taken


def compared(taken: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Median, spread and speed-up of each side over the first.

    Beside the clock the processor's time: it says more where others use the machine.
    """
    clock, worked = (
        {name: [pair[which] for pair in pairs] for name, pairs in taken.items()} for which in (0, 1)
    )
    first = next(iter(taken))
    return {
        name: {
            "median_s": round(statistics.median(clock[name]), 5),
            "range_s": [round(min(clock[name]), 5), round(max(clock[name]), 5)],
            "calls": len(clock[name]),
            "speed_up": round(statistics.median(clock[first]) / statistics.median(clock[name]), 3),
            "processor_s": round(statistics.median(worked[name]), 5),
            "processor_ratio": round(
                statistics.median(worked[first]) / statistics.median(worked[name]), 3
            ),
        }
        for name in taken
    }
