"""`lumina dead` and `lumina epoch` on a real Redis."""

import asyncio

import pytest

from server import cli
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import BOOM, claim_one, submit


def on_queue(url, act):
    async def main():
        queue = JobQueue(connect(url), max_attempts=1)
        try:
            return await act(queue)
        finally:
            await queue.close()

    return asyncio.run(main())


async def bury(queue):
    job_id = await submit(queue)
    await queue.fail(await claim_one(queue), BOOM, retry=True)
    return job_id


@pytest.fixture
def lumina(redis_url, capsys):
    """Run a command; returns its exit code, what it printed and what it complained."""

    def run(*argv):
        code = cli.main([*argv, "--redis-url", redis_url])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_dead_jobs_are_listed_shown_retried_and_purged(lumina, redis_url):
    first, second = (on_queue(redis_url, bury) for _ in range(2))
    code, out, _ = lumina("dead", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [second, first]
    assert "internal" in out
    code, out, _ = lumina("dead", "show", first)
    assert (code, "a red circle" in out, "boom" in out) == (0, True, True)
    code, out, _ = lumina("dead", "retry", first)
    old, new = out.split()
    assert (code, old) == (0, first)
    assert on_queue(redis_url, lambda queue: queue.get(new)).retry_of == first
    assert lumina("dead", "retry", first)[0] == 1
    assert lumina("dead", "purge", "--all")[:2] == (0, "1 purged\n")
    assert lumina("dead", "list")[:2] == (0, "")


def test_an_epoch_is_shown_and_accepted(lumina, redis_url):
    async def lose(queue):
        await queue.reap()
        await queue.redis.flushall()
        await queue.reap()

    assert lumina("epoch", "show")[0] == 0
    on_queue(redis_url, lose)
    code, out, _ = lumina("epoch", "show")
    assert (code, "epoch is gone" in out) == (1, True)
    assert lumina("epoch", "accept")[0] == 0
    assert lumina("epoch", "show")[0] == 0


@pytest.mark.parametrize("argv", [("purge",), ("retry", "--all", "x")])
def test_ids_or_all_but_not_both(lumina, argv):
    code, _, err = lumina("dead", *argv)
    assert (code, "either job ids or --all" in err) == (1, True)
