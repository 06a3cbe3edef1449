"""Webhooks are delivered once or more, signed, to nowhere else, whatever the receiver does."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from server.api.image_links import ImageLinks
from server.api.webhook_targets import WebhookGuard
from server.api.webhooks import MAX_PER_CALLER, WebhookCourier, retry_in_s
from server.protocol import new_job_id
from server.queue import submission
from server.queue.api_keys import KeyRing, anonymous_webhook_secret, new_webhook_secret
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from tests.certificates import self_signed
from tests.fakes import FakeClock
from tests.server.fake_worker import service
from tests.server.keyed import keyed
from tests.server.queue.helpers import RESULT, claim_one, spec
from tests.server.webhook_receiver import Heard, receiving, status

ASYNC = {"prefer": "respond-async"}
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
ALLOWED = {"webhook_allow_cidrs": "127.0.0.0/8, ::1/128"}
SECRET = new_webhook_secret()


def verified(heard: Heard, secret: str) -> dict[str, Any]:
    """The message, as a receiver's library reads it."""
    message: dict[str, Any] = Webhook(secret).verify(heard.body, heard.headers)
    return message


class Outing:
    """A courier with a queue and a clock of its own."""

    def __init__(self, queue: JobQueue, clock: FakeClock, **options: Any) -> None:
        self.queue, self.clock = queue, clock
        self.names: dict[str, list[str]] = {"hooks.test": ["127.0.0.1"]}
        self.asked: list[str] = []
        guard = WebhookGuard([LOOPBACK], self.lookup)
        links = ImageLinks(queue, signed=False)
        self.courier = WebhookCourier(queue, guard, links, SECRET, **options)

    async def lookup(self, name: str) -> list[str]:
        self.asked.append(name)
        return self.names[name]

    async def ended(self, url: str, **options: Any) -> str:
        """A job with a webhook that has ended."""
        job_id = new_job_id()
        hook = submission.Webhook(url, options.pop("key_hash", ""))
        await self.queue.submit(job_id, spec(), webhook=hook, **options)
        await self.queue.cancel(job_id)
        return job_id

    async def deliver(self) -> None:
        """Make the attempts that are due."""
        await self.courier.turn()
        await self.courier.idle()

    async def left(self) -> int:
        return await self.queue.num_deliveries()


@contextlib.asynccontextmanager
async def outing(redis_url: str, **options: Any) -> AsyncIterator[Outing]:
    clock = FakeClock()
    queue = JobQueue(connect(redis_url), clock_ms=clock)
    try:
        yield Outing(queue, clock, **options)
    finally:
        await queue.close()


def test_a_receiver_is_told_what_the_job_answers_and_can_verify_it(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, settings=ALLOWED) as it, receiving() as receiver:
            key, client = await it.member()
            url = f"http://127.0.0.1:{receiver.port}/hook?a=b"
            ends = {}
            for prompt in ("a red circle", "fail loudly", "hang"):
                body = {"prompt": prompt, "webhook_url": url, "metadata": {"order": 7}}
                job_id = (await client.post("/generate", json=body, headers=ASYNC)).json()["id"]
                if prompt == "hang":
                    await client.post(f"/jobs/{job_id}/cancel")
                ends[job_id] = prompt
            await receiver.until(3)
            for heard in receiver.heard:
                assert heard.line == "POST /hook?a=b HTTP/1.1"
                assert heard.headers["content-type"] == "application/json"
                message = verified(heard, key.webhook_secret)
                job = (await client.get(f"/jobs/{message['data']['id']}")).json()
                for image in (*message["data"]["images"], *job["images"]):
                    image["url"], signature = image["url"].split("?")  # which may differ in time
                    assert "signature=" in signature
                assert message["data"] == job
                assert message["type"] == f"job.{job['status']}"
                assert message["timestamp"] == job["finished_at"]
                assert heard.headers["webhook-id"] == f"msg_{job['id']}"
                assert ends.pop(job["id"]) not in heard.body
            assert not ends
            heard = receiver.heard[0]
            content = f"{heard.headers['webhook-id']}.{heard.headers['webhook-timestamp']}."
            raw = base64.b64decode(key.webhook_secret.removeprefix("whsec_"))
            mac = hmac.new(raw, (content + heard.body).encode(), hashlib.sha256).digest()
            assert heard.headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
            with pytest.raises(WebhookVerificationError):
                verified(heard, SECRET)
            async with asyncio.timeout(10):
                while await it.queue.num_deliveries():
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())


@pytest.mark.parametrize("given", [SECRET, ""], ids=["given", "drawn"])
def test_callers_without_a_key_have_the_services_secret(
    redis_url: str, tmp_path: Path, given: str
) -> None:
    async def scenario() -> None:
        settings = ALLOWED | {"webhook_secret": given}
        async with service(redis_url, tmp_path, settings=settings) as it, receiving() as receiver:
            url = f"http://127.0.0.1:{receiver.port}/"
            assert (await it.generate({"prompt": "x", "webhook_url": url})).status_code == 200
            await receiver.until(1)
            secret = given or await anonymous_webhook_secret(it.queue)
            assert verified(receiver.heard[0], secret)["type"] == "job.succeeded"

    asyncio.run(scenario())


def test_a_private_target_is_refused_at_submit(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it, receiving() as receiver:
            for url in (
                f"http://127.0.0.1:{receiver.port}/", f"http://localhost:{receiver.port}/",
                f"http://2130706433:{receiver.port}/", f"http://[::ffff:127.0.0.1]:{receiver.port}/",
                "http://169.254.169.254/latest/meta-data/", "http://user:pass@example.org/",
                "ftp://example.org/", "nonsense", "http://example.org:22/",
            ):  # fmt: skip
                answer = await it.generate({"prompt": "x", "webhook_url": url}, **ASYNC)
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request"), url
                assert answer.json()["errors"][0]["field"] == "webhook_url"
                assert answer.json()["detail"].startswith("webhook_url must ")
            for wrong in ("", 5, ["http://example.org/"], "http://example.org/" + "a" * 3000):
                answer = await it.generate({"prompt": "x", "webhook_url": wrong}, **ASYNC)
                assert answer.status_code == 422
            assert await it.queue.open_jobs() == 0
            assert receiver.connections == 0

    asyncio.run(scenario())


def test_a_failed_attempt_is_repeated_later_as_the_same_message(redis_url: str) -> None:
    async def scenario() -> None:
        answers = (status(500), status(301, "Location: http://127.0.0.1:1/"), status(204))
        async with outing(redis_url) as it, receiving(*answers) as receiver:
            await it.ended(f"http://hooks.test:{receiver.port}/")
            for tries in (1, 2, 3):
                await it.deliver()
                assert len(receiver.heard) == tries
                await it.deliver()  # not before its time
                assert len(receiver.heard) == tries
                it.clock.advance(1.3 * 5 * 3 ** (tries - 1))
            assert await it.left() == 0
            assert len({heard.headers["webhook-id"] for heard in receiver.heard}) == 1
            assert [verified(heard, SECRET)["type"] for heard in receiver.heard]

    asyncio.run(scenario())


def test_redirects_are_not_followed(redis_url: str) -> None:
    async def scenario() -> None:
        async with outing(redis_url) as it, receiving() as inner:
            for code in (301, 302, 303, 307, 308):
                location = f"Location: http://127.0.0.1:{inner.port}/"
                async with receiving(status(code, location)) as receiver:
                    await it.ended(f"http://hooks.test:{receiver.port}/")
                    await it.deliver()
                    assert len(receiver.heard) == 1
            assert inner.connections == 0
            assert await it.left() == 5

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_receiver_can_neither_hold_nor_flood_nor_confuse_us(redis_url: str) -> None:
    async def scenario() -> None:
        endless = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nxxxxx\r\n" * 9999
        )
        for answer, delivered in (
            (endless, True), (status(200, "Content-Encoding: gzip", body="no gzip"), True),
            (status(201, "Set-Cookie: a=b"), True), (None, False), (b"", False),
            (b"\x00\xff" * 100, False), (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 99999, False),
            (status(404), False), (status(100), False),
        ):  # fmt: skip
            async with outing(redis_url, attempt_s=1.0) as it, receiving(answer) as receiver:
                await it.ended(f"http://hooks.test:{receiver.port}/")
                async with asyncio.timeout(10):
                    await it.deliver()
                assert receiver.connections == 1
                assert "cookie" not in receiver.heard[0].headers
                assert await it.left() == (0 if delivered else 1), answer and answer[:60]
                await it.queue.redis.flushall()

    asyncio.run(scenario())


def test_a_name_that_answers_differently_later_reaches_nothing(redis_url: str) -> None:
    """Rebinding: public when the job was submitted, private when it ends."""

    async def scenario() -> None:
        async with outing(redis_url) as it, receiving() as receiver:
            it.names["hooks.test"] = ["10.0.0.1"]
            await it.ended(f"http://hooks.test:{receiver.port}/")
            await it.ended(f"http://2130706433:{receiver.port}/")  # as if accepted once
            await it.deliver()
            assert (receiver.connections, await it.left()) == (0, 2)
            it.clock.advance(10)
            it.names["hooks.test"] = ["127.0.0.1", "10.0.0.1"]
            await it.deliver()
            assert receiver.connections == 0
            it.clock.advance(30)
            it.names["hooks.test"] = ["127.0.0.1"]
            asked = len(it.asked)
            await it.deliver()
            assert len(receiver.heard) == 1
            assert len(it.asked) == asked + 1  # the address that was checked was the one called
            assert receiver.heard[0].headers["host"] == f"hooks.test:{receiver.port}"

    asyncio.run(scenario())


def test_tls_names_the_host_and_believes_no_other(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        pem = self_signed("hooks.test", tmp_path)
        theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        theirs.load_cert_chain(pem)
        names: list[str | None] = []
        theirs.sni_callback = lambda _, name, __: names.append(name)
        ours = ssl.create_default_context(cafile=str(pem))
        async with outing(redis_url, tls=ours) as it, receiving(tls=theirs) as receiver:
            it.names["other.test"] = ["127.0.0.1"]
            await it.ended(f"https://hooks.test:{receiver.port}/")
            await it.ended(f"https://other.test:{receiver.port}/")
            await it.ended(f"https://127.0.0.1:{receiver.port}/")
            await it.deliver()
            assert [heard.headers["host"] for heard in receiver.heard] == [
                f"hooks.test:{receiver.port}"
            ]
            assert {"hooks.test", "other.test"} <= set(names)
            assert await it.left() == 2

    asyncio.run(scenario())


@pytest.mark.slow
def test_one_callers_slow_receivers_do_not_keep_others_waiting(redis_url: str) -> None:
    async def scenario() -> None:
        async with outing(redis_url, attempt_s=3) as it, receiving(None) as slow:
            ring = KeyRing(it.queue)
            noisy, _ = await ring.create()
            quiet, _ = await ring.create()
            for _ in range(MAX_PER_CALLER + 8):
                await it.ended(f"http://hooks.test:{slow.port}/", key_hash=noisy.sha256)
            async with receiving() as receiver:
                url = f"http://hooks.test:{receiver.port}/"
                await it.ended(url, key_hash=quiet.sha256)
                assert not await it.courier.turn()
                await receiver.until(1)
                verified(receiver.heard[0], quiet.webhook_secret)
                await slow.until(MAX_PER_CALLER)
                it.clock.advance(2)
                waiting = await it.queue.take_deliveries(99)
                assert [delivery.tries for delivery in waiting] == [1] * 8  # none was charged
            await it.courier.idle()
            assert slow.connections == MAX_PER_CALLER

    asyncio.run(scenario())


def test_what_is_hopeless_is_given_up(redis_url: str) -> None:
    async def scenario() -> None:
        async with outing(redis_url) as it, receiving(status(410)) as receiver:
            url = f"http://hooks.test:{receiver.port}/"
            await it.ended(url)
            await it.deliver()
            assert (len(receiver.heard), await it.left()) == (1, 0)
            key, _ = await KeyRing(it.queue).create()
            await it.ended(url, key_hash=key.sha256)
            await KeyRing(it.queue).revoke(key.id)
            await it.deliver()
            assert (len(receiver.heard), await it.left()) == (1, 0)
            it.names["hooks.test"] = ["10.0.0.1"]
            await it.ended(url)
            it.clock.advance(24 * 3600 - 1)
            await it.deliver()
            assert await it.left() == 0

    asyncio.run(scenario())


def test_waiting_times_grow_and_are_not_all_the_same() -> None:
    waits = [[retry_in_s(tries) for _ in range(50)] for tries in (1, 2, 3, 12, 10**9)]
    for some, middle in zip(waits, (5, 15, 45, 3600, 3600), strict=True):
        assert len(set(some)) > 10
        assert all(0.75 * middle <= wait <= 1.25 * middle for wait in some)


def test_a_job_that_was_deleted_meanwhile_is_told_of_without_its_record(redis_url: str) -> None:
    async def scenario() -> None:
        async with outing(redis_url) as it, receiving() as receiver:
            job_id = await it.ended(f"http://hooks.test:{receiver.port}/")
            await it.queue.redis.delete(f"{{lumina}}:job:{job_id}")
            await it.deliver()
            message = verified(receiver.heard[0], SECRET)
            assert message["data"] == {"id": job_id, "status": "canceled"}

    asyncio.run(scenario())


DOOMED = """
import asyncio, ipaddress, sys
from server.api.image_links import ImageLinks
from server.api.webhook_targets import WebhookGuard
from server.api.webhooks import WebhookCourier
from server.queue.connection import connect
from server.queue.jobs import JobQueue

async def main():
    queue = JobQueue(connect(sys.argv[1]))
    guard = WebhookGuard([ipaddress.ip_network("127.0.0.0/8")])
    links = ImageLinks(queue, signed=False)
    await WebhookCourier(queue, guard, links, sys.argv[2], lease_s=1.0).run()

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_message_survives_the_death_of_its_deliverer(redis_url: str) -> None:
    """kill -9 between the receiver's reading and its answer."""

    async def scenario() -> None:
        queue = JobQueue(connect(redis_url))
        async with receiving(None, status(204)) as receiver:
            job_id = new_job_id()
            url = f"http://127.0.0.1:{receiver.port}/"
            await queue.submit(job_id, spec(), webhook=submission.Webhook(url))
            await queue.complete(await claim_one(queue), RESULT)
            processes = []
            for count in (1, 2):
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", DOOMED, redis_url, SECRET
                )
                processes.append(process)
                await receiver.until(count)
                if count == 1:
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
            async with asyncio.timeout(20):
                while await queue.num_deliveries():
                    await asyncio.sleep(0.05)
            processes[1].kill()
            await processes[1].wait()
        await queue.close()
        first, second = (verified(heard, SECRET) for heard in receiver.heard)
        assert first == second
        assert first["data"]["id"] == job_id
        ids = {heard.headers["webhook-id"] for heard in receiver.heard}
        assert ids == {f"msg_{job_id}"}
        assert json.loads(receiver.heard[0].body) == first

    asyncio.run(scenario())
