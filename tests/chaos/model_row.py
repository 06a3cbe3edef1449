"""The row "state machine": Hypothesis against the real scripts."""

import asyncio
import tempfile
from pathlib import Path

from server.embedded import EmbeddedRedis
from tests.chaos.table import Row
from tests.server.queue.test_state_machine import run_machine

STEPS_OF_A_RUN = 100


async def state_machine(steps: int) -> Row:
    """At least `steps` steps; after each, every accepted job is in exactly one place."""
    row = Row("state machine, steps as faults", 0)
    with tempfile.TemporaryDirectory() as folder:
        redis = EmbeddedRedis(Path(folder))
        redis.start()
        try:
            seed = 0
            while row.faults < steps:
                seed += 1
                done = await asyncio.to_thread(run_machine, redis.url, 50, STEPS_OF_A_RUN, seed)
                row.faults += done.steps
                row.verdict.jobs += done.jobs
        except AssertionError as error:
            row.complaints.append(str(error).splitlines()[0])
        finally:
            redis.stop()
    return row
