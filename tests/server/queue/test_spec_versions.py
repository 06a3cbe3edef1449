"""A rolling upgrade loses nothing: job specifications of every version are still taken.

A fixture is the JSON that a process of that version wrote, or the scripts that its workers run,
kept for ever. New versions add files.
"""

from pathlib import Path

import pytest

from server.protocol import SPEC_VERSION, TERMINAL_STATUSES, JobSpec, new_job_id
from server.queue import keys
from server.queue.connection import connect, script_text
from server.queue.jobs import JobQueue, Webhook
from tests.server.queue.helpers import BOOM, POOL, RESULT, claim_one, submit

KEPT = Path(__file__).parents[2] / "fixtures"
FIXTURES = sorted((KEPT / "job_specs").glob("*.json"))
SCRIPTS = KEPT / "queue_scripts"


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


class Version1(JobQueue):
    """Runs the worker's scripts of version 1, kept as fixtures."""

    def __init__(self, redis, clock):
        super().__init__(redis, clock_ms=clock)
        folder = SCRIPTS / "v1"
        common = (folder / "common.lua").read_text() + "\nlocal told = {}\n"  # it had no metrics
        for path in folder.glob("*.lua"):
            if path.stem != "common":
                self._scripts[path.stem] = redis.register_script(
                    script_text(common, path.read_text())
                )

    async def run(self, name, *args):
        """Claims of that time said nothing of priority and deadline."""
        answer = await super().run(name, *args)
        return [[*taken, "normal", -1] for taken in answer] if name == "claim" else answer


def test_two_versions_of_workers_share_one_queue(in_queue, redis_url, clock):
    """They run side by side on the same jobs: each may take back what the other lost."""

    async def test(new):
        old = Version1(connect(redis_url), clock)
        ids = []
        for path in FIXTURES * 6:
            ids.append(new_job_id())
            spec = JobSpec.from_json(path.read_text())
            await new.submit(ids[-1], spec, webhook=Webhook("https://x"))
        ends = {"succeeded": 0, "failed": 0}
        for turn in range(6 * len(ids)):
            queue, other = (new, old) if turn % 2 else (old, new)
            for held in await queue.claim(f"w{turn}", POOL, 1, 1e9):
                assert await queue.heartbeat(held.worker, POOL, [held]) == []
                assert await queue.progress(held, 1, 4) == "held"
                await say_last_word(turn, queue, other, held, clock)
            clock.advance(5)
            await queue.reap()
        for job_id in ids:
            record = await new.get(job_id)
            ends[record.status] += 1
            story = [event.type for event in await new.events(job_id)]
            assert [kind for kind in story if kind in TERMINAL_STATUSES] == [record.status]
        assert ends["succeeded"] + ends["failed"] == len(ids)
        assert old.data_lost == new.data_lost == ""
        assert await new.depth() == 0
        await old.close()

    in_queue(test)


async def say_last_word(turn, queue, other, held, clock):
    """One of the ways in which a claim ends, judged by the other version where that matters."""
    way = turn % 5
    if way == 0:
        assert await queue.complete(held, RESULT)
    elif way == 1:
        assert await queue.fail(held, BOOM, retry=True)
    elif way == 2:
        assert await queue.release(held)
    elif way == 3:  # its worker dies; the other version takes the job back
        clock.advance(16)
        await other.reap()
        clock.advance(16)
        await other.reap()
        assert not await queue.complete(held, RESULT)
    else:
        assert await other.complete(held, RESULT)  # the fence is the same in both
        assert not await queue.fail(held, BOOM, retry=True)
