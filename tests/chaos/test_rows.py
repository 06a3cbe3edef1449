"""Short versions of the fault table; `make chaos` runs the long ones."""

import asyncio

import pytest

from tests.chaos import edge_rows, load_rows, redis_rows, worker_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("row", "times"),
    [
        (worker_rows.kill_9_a_worker_mid_batch, 3),
        (worker_rows.sigstop_a_worker_past_its_lease, 1),
        (worker_rows.sigterm_under_load, 3),
        (worker_rows.poison_job_in_a_batch_of_eight, 1),
        (redis_rows.kill_9_redis, 2),
        (redis_rows.power_loss, 1),
        (redis_rows.flushall, 1),
        (redis_rows.script_flush, 5),
        (redis_rows.clocks_ten_minutes_wrong, 5),
        (redis_rows.redis_at_maxmemory, 1),
        (edge_rows.bad_network, 3),
        (edge_rows.reader_killed_mid_stream, 1),
        (edge_rows.blob_store_failing, 2),
        (worker_rows.cancel_racing_completion, 40),
        (worker_rows.canceled_jobs_free_the_device, 2),
        (load_rows.overload_by_a_noisy_tenant, 7),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_row(tmp_path, row, times):
    result = asyncio.run(row(tmp_path, times))
    assert result.holds, result
    assert result.verdict.jobs > 0


def test_the_history_checker_sees_what_is_wrong(redis_url, tmp_path):
    """Lost, ended twice, ended wrongly, succeeded without a picture: each is told apart."""
    from server.protocol import new_job_id
    from server.queue import keys
    from server.queue.blobs import BlobStore
    from server.queue.connection import connect
    from server.queue.jobs import JobQueue
    from tests.chaos.history import judge
    from tests.server.queue.helpers import RESULT, claim_one, submit

    async def test():
        queue = JobQueue(connect(redis_url))
        try:
            done = []
            for _ in range(2):
                await submit(queue)
                held = await claim_one(queue)
                await queue.complete(held, RESULT)
                done.append(held.job_id)
            await queue.redis.xadd(keys.events(done[1]), {"type": "failed"})
            canceled = await submit(queue)
            await queue.cancel(canceled)
            still_open, unknown = await submit(queue), new_job_id()
            jobs = [*done, canceled, still_open, unknown]
            verdict = await judge(queue, jobs, blobs=BlobStore(f"file://{tmp_path}"))
        finally:
            await queue.close()
        assert verdict.lost == [still_open, unknown]
        assert verdict.duplicate == done[1:]
        assert verdict.unexpected == [canceled]
        assert verdict.unreadable == done[:1]
        assert not verdict.holds

    asyncio.run(test())
