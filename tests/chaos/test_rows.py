"""Short versions of the fault table; `make chaos` runs the long ones."""

import asyncio

import pytest

from tests.chaos import rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("row", "times"),
    [
        (rows.kill_9_a_worker_mid_batch, 3),
        (rows.sigstop_a_worker_past_its_lease, 1),
        (rows.sigterm_under_load, 3),
        (rows.poison_job_in_a_batch_of_eight, 1),
        (rows.kill_9_redis, 2),
        (rows.power_loss, 1),
        (rows.cancel_racing_completion, 40),
        (rows.overload_by_a_noisy_tenant, 90),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_row(tmp_path, row, times):
    result = asyncio.run(row(tmp_path, times))
    assert result.holds, result
    assert result.verdict.jobs > 0
