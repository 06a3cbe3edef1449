"""The line to Redis: one error, cancellations that get through, scripts that are sent again."""

import asyncio
import contextlib
import inspect
import re
import ssl
import subprocess

import pytest
from redis import Redis

from server.errors import QueueUnavailable
from server.protocol import new_job_id
from server.queue.connection import RedisLine, connect, guarded
from server.queue.jobs import JobQueue
from tests.server.queue.helpers import POOL, RESULT, claim_one, spec, submit
from tests.tcp_proxy import proxy


def test_no_redis_is_one_clear_error():
    async def test():
        queue = JobQueue(connect("redis://127.0.0.1:1/0"))
        for call in (queue.ping(), queue.get(new_job_id()), queue.submit(new_job_id(), spec())):
            with pytest.raises(QueueUnavailable, match="does not answer"):
                await call
        with contextlib.suppress(QueueUnavailable):
            await queue.close()

    asyncio.run(test())


def test_scripts_survive_a_script_flush(in_queue, redis_url):
    async def test(queue):
        await submit(queue)
        with Redis.from_url(redis_url) as client:
            client.script_flush()
        assert await queue.complete(await claim_one(queue), RESULT)

    in_queue(test)


def test_a_cancellation_gets_through_a_client_that_swallows_it():
    async def stubborn():
        for _ in range(3):  # as `asyncio.wait_for` may, up to Python 3.11
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(10)
        return "an answer nobody waits for"

    async def test():
        task = asyncio.create_task(guarded(stubborn()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(test(), 5))


@pytest.mark.parametrize(
    "url", ["sentinel://", "sentinel://h", "sentinel://h/", "sentinel://h/m/x"]
)
def test_a_sentinel_url_names_its_form(url):
    with pytest.raises(ValueError, match=re.escape("sentinel://[user:password@]host[:port]")):
        connect(url)


def test_a_sentinel_url_is_read_in_full():
    client = connect("sentinels://us%3Aer:p%40ss@one,two:7,[::1]:8/jobs/3?ssl_cert_reqs=none")
    options = client.connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("us:er", "p@ss", 3)
    assert options["decode_responses"] is True
    sentinels = client.connection_pool.sentinel_manager.sentinels
    found = [s.connection_pool.connection_kwargs for s in sentinels]
    places = [(each["host"], each["port"]) for each in found]
    assert places == [
        ("one", 26379),
        ("two", 7),
        ("::1", 8),
    ]
    assert all(each["ssl_cert_reqs"] == "none" for each in (*found, options))


def test_tls_and_an_acl_user_with_the_least_rights(redis_url, tmp_path):
    """docs/reliability.md gives this rule."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make, "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)

    async def test():
        async with proxy(redis_url.removeprefix("unix://"), context) as line:
            url = f"rediss://lumina:secret@localhost:{line.port}/0"
            queue = JobQueue(connect(f"{url}?ssl_ca_certs={cert}"))
            stranger = JobQueue(connect(url))  # does not know who signed
            try:
                assert await queue.preflight() == []
                waiter = asyncio.create_task(queue.wait(await submit(queue), 10))
                held = await claim_one(queue)
                assert await queue.heartbeat("w1", POOL, [held]) == []
                await queue.wait_for_work(POOL, 0.1)
                await queue.reap()
                await queue.reconcile()
                assert await queue.complete(held, RESULT)
                assert (await waiter).status == "succeeded"
                with pytest.raises(QueueUnavailable, match=r"(?i)permission"):
                    await queue.ask(queue.redis.get("somebody else's"))
                with pytest.raises(QueueUnavailable, match=r"(?i)certificate"):
                    await stranger.depth()
            finally:
                await queue.close()
                await stranger.close()

    with Redis.from_url(redis_url) as admin:
        rights = "~{lumina}:* resetchannels &{lumina}:* +@all -@dangerous +info +config|get"
        rule = ["reset", "on", ">secret", *rights.split()]
        admin.execute_command("ACL", "SETUSER", "lumina", *rule)
        try:
            asyncio.run(test())
        finally:
            admin.acl_deluser("lumina")


def test_a_call_given_up_before_it_starts_leaves_nothing_unawaited():
    """Python warns of a coroutine nobody awaited, at some later and unrelated moment."""

    async def call():
        raise AssertionError("started although it was given up")

    async def test():
        line = RedisLine(connect("redis://127.0.0.1:1/0"))
        line._hang_up()
        asked = call()
        task = asyncio.create_task(line.ask(asked))
        await asyncio.sleep(0)  # `ask` waits for the connections to be closed
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert inspect.getcoroutinestate(asked) == inspect.CORO_CLOSED
        await line.close()

    asyncio.run(test())
