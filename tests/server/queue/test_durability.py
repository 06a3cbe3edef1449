"""Durability levels: what an acknowledged job has outlived, on real servers."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import time

import pytest
from redis import Redis

from server.embedded import EmbeddedRedis
from server.embedded.redis_server import find_redis_server
from server.errors import QueueUnavailable
from server.queue import keys
from server.queue.connection import connect
from server.queue.durability import CONFIRM_MS
from server.queue.jobs import JobQueue
from tests.fakes import wait_until
from tests.server.queue.helpers import submit
from tests.server.queue.test_health import configured


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def redis_server(folder, *options):
    """A redis-server on a port of its own; yields its port and process."""
    port = free_port()
    folder.mkdir()
    argv = [find_redis_server(), "--port", port, "--bind", "127.0.0.1", "--dir", folder, *options]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([str(each) for each in argv], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port), what="redis-server")
        yield port, process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(10)


def answers(port):
    with Redis(port=port) as client, contextlib.suppress(Exception):
        return client.ping()


def try_submit(url, count=1, **options):
    async def main():
        queue = JobQueue(connect(url), **options)
        try:
            return [await submit(queue) for _ in range(count)]
        finally:
            await queue.close()

    return asyncio.run(main())


def test_everysec_asks_for_nothing(in_queue):
    async def test(queue):
        await queue.redis.config_resetstat()
        await submit(queue)
        assert {"cmdstat_wait", "cmdstat_waitaof"}.isdisjoint(
            await queue.redis.info("commandstats")
        )
        assert queue.confirm_s == 0

    in_queue(test)


def test_fsync_is_refused_where_the_server_does_not_sync(in_queue):
    async def test(queue):
        with pytest.raises(QueueUnavailable, match="appendfsync everysec"):
            await submit(queue)
        async with configured(queue, appendonly="no"):
            with pytest.raises(QueueUnavailable, match="appendonly off"):
                await submit(queue)
        assert await queue.depth() == 0
        async with configured(queue, appendfsync="always"):
            await submit(queue)
        assert await queue.depth() == 1

    in_queue(test, durability="fsync")


def test_the_embedded_server_syncs_always_where_asked(tmp_path):
    redis = EmbeddedRedis(tmp_path, fsync="always")
    redis.start()
    try:
        assert len(try_submit(redis.url, durability="fsync")) == 1
    finally:
        redis.stop()


class WaitaofServer:
    """Speaks for a Redis 7.2: says so in INFO, and answers WAITAOF as it is told."""

    def __init__(self, path, copies):
        self.path, self.copies, self.asked = path, copies, []

    async def serve(self, reader, writer):
        back_reader, back_writer = await asyncio.open_unix_connection(self.path)
        try:
            while head := await reader.readline():
                parts = [head]
                for _ in range(int(head[1:])):
                    size = await reader.readline()
                    parts += [size, await reader.readexactly(int(size[1:]) + 2)]
                words = [part.strip() for part in parts[2::2]]
                if words[0] == b"WAITAOF":
                    self.asked.append(words)
                    writer.write(b"*2\r\n:%d\r\n:0\r\n" % self.copies)
                    continue
                back_writer.write(b"".join(parts))
                writer.write((await reply(back_reader)).replace(b"version:6.2", b"version:7.2"))
        finally:
            back_writer.close()
            writer.close()


async def reply(reader):
    line = await reader.readline()
    kind, rest = line[:1], line[1:].strip()
    if kind in b"$=" and rest != b"-1":
        return line + await reader.readexactly(int(rest) + 2)
    if kind in b"*~%":
        parts = int(rest) * (2 if kind == b"%" else 1)
        return line + b"".join([await reply(reader) for _ in range(parts)])
    return line


@pytest.mark.parametrize("copies", [1, 0])
def test_a_newer_server_is_asked_to_wait_for_its_disk(redis_url, copies):
    async def test():
        fake = WaitaofServer(redis_url.removeprefix("unix://"), copies)
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        queue = JobQueue(connect(f"redis://127.0.0.1:{port}/0"), durability="fsync")
        try:
            if copies:
                await submit(queue)
            else:
                with pytest.raises(QueueUnavailable, match="not on disk"):
                    await submit(queue)
        finally:
            await queue.close()
            server.close()
        assert fake.asked == [[b"WAITAOF", b"1", b"0", str(CONFIRM_MS).encode()]]

    asyncio.run(test())


@pytest.mark.slow
def test_with_replica_nothing_acknowledged_is_lost_in_a_failover(tmp_path):
    """Row "failover": the master is gone for good, its replica takes over."""
    with contextlib.ExitStack() as stack:
        port, master = stack.enter_context(redis_server(tmp_path / "master"))
        replica_of = ("--replicaof", "127.0.0.1", port)
        other, replica = stack.enter_context(redis_server(tmp_path / "replica", *replica_of))
        client = stack.enter_context(Redis(port=other, decode_responses=True))
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        url = f"redis://127.0.0.1:{port}/0"
        ids = try_submit(url, count=50, durability="replica")
        replica.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match="not on a replica"):
            try_submit(url, durability="replica")
        assert time.monotonic() - began < CONFIRM_MS / 1000 + 2
        replica.send_signal(signal.SIGCONT)
        master.kill()
        client.replicaof("NO", "ONE")
        assert all(client.hget(keys.job(job_id), "status") for job_id in ids)


@pytest.mark.slow
def test_sentinel_names_the_master_and_its_successor(tmp_path):
    with redis_server(tmp_path / "first") as (first, master):
        replica_of = ("--replicaof", "127.0.0.1", first)
        with redis_server(tmp_path / "second", *replica_of) as (second, _):
            with Redis(port=second) as client:
                wait_until(lambda: client.info("replication")["master_link_status"] == "up")
            file = tmp_path / "sentinel.conf"
            file.write_text(
                f"sentinel monitor jobs 127.0.0.1 {first} 1\n"
                "sentinel down-after-milliseconds jobs 1000\nsentinel failover-timeout jobs 5000\n"
            )
            port = free_port()
            argv = [find_redis_server(), file, "--sentinel", "--port", str(port)]
            sentinel = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
            try:
                wait_until(lambda: answers(port), what="the sentinel")
                with Redis(port=port, decode_responses=True) as asked:
                    wait_until(lambda: asked.execute_command("SENTINEL", "REPLICAS", "jobs"))
                asyncio.run(live_through_a_failover(port, master))
            finally:
                sentinel.kill()
                sentinel.wait(10)


async def live_through_a_failover(port, master):
    queue = JobQueue(connect(f"sentinel://127.0.0.1:{port}/jobs/0"), durability="replica")
    try:
        job_id = await submit(queue)
        queue.durability = "everysec"  # the successor is alone
        master.kill()
        deadline = time.monotonic() + 30
        while True:
            try:
                assert (await queue.get(job_id)).status == "queued"
                await submit(queue)
                return
            except QueueUnavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
    finally:
        await queue.close()
