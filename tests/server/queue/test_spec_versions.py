"""A rolling upgrade loses nothing: job specifications of every version are still taken.

A fixture is the JSON that a process of that version wrote, kept for ever. New versions add files.
"""

from pathlib import Path

import pytest

from server.protocol import SPEC_VERSION, JobSpec, new_job_id
from server.queue import keys
from tests.server.queue.helpers import POOL, RESULT, claim, claim_one, submit

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures" / "job_specs").glob("*.json"))


def test_every_version_has_a_fixture():
    assert {int(path.name[1:].split("-")[0]) for path in FIXTURES} == set(
        range(1, SPEC_VERSION + 1)
    )


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_job_that_an_older_process_queued_is_run(in_queue, path):
    text = path.read_text().strip()

    async def test(queue):
        job_id = await submit(queue)
        await queue.redis.hset(keys.job(job_id), "spec", text)  # as the older API wrote it
        record = await queue.get(job_id)
        held = await claim_one(queue)
        assert held.spec == record.spec == JobSpec.from_json(text)
        assert (held.spec.version, held.spec.seed) == (1, record.spec.seed)
        assert await queue.complete(held, RESULT)

    in_queue(test)


def test_two_versions_of_workers_share_one_queue(in_queue):
    """The older one knows neither deadlines nor draining: it sends what version 1 sent."""

    async def test(queue):
        for path in FIXTURES * 2:
            job_id = new_job_id()
            await queue.submit(job_id, JobSpec.from_json(path.read_text()))
        old, new = await claim(queue, "old", max_jobs=2), await claim(queue, "new", max_jobs=9)
        assert (len(old), len(new)) == (2, 2 * len(FIXTURES) - 2)
        assert await queue.run("heartbeat", "old", POOL, 15_000, 0, old[0].job_id, 1) == ["held"]
        for held in (*old, *new):
            assert await queue.complete(held, RESULT)
        assert await queue.depth() == 0

    in_queue(test)
