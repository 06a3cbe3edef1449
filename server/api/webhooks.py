"""WebhookCourier: tells webhooks that jobs have ended, as Standard Webhooks describes it.

Every API process takes deliveries from the outbox. One that dies meanwhile has only delayed its
own: a receiver may hear the same message twice, with the same `webhook-id`.
"""

import asyncio
import json
import random
import ssl
from collections import Counter
from datetime import UTC, datetime
from functools import cache

import httpx
import structlog
from standardwebhooks import Webhook

from server import metrics
from server.api.answers import job_answer, rfc3339
from server.api.image_links import ImageLinks
from server.api.webhook_targets import ForbiddenTarget, LookupFailed, WebhookGuard, parse_target
from server.errors import QueueUnavailable
from server.queue.api_keys import KeyRing, anonymous_webhook_secret
from server.queue.jobs import JobQueue
from server.queue.outbox import Delivery

POLL_S = (0.5, 1.0)
MAX_IN_FLIGHT = 64
MAX_PER_CALLER = 16  # so that one caller's slow receivers do not keep everybody's messages waiting
TURN_AWAY_S = 1.5

CONNECT_S = 5.0
ATTEMPT_S = 15.0  # for everything: a receiver cannot hold us by sending a byte now and then
LEASE_S = 2 * ATTEMPT_S

FIRST_RETRY_S = 5.0
RETRY_FACTOR = 3
LONGEST_RETRY_S = 3600.0
GIVE_UP_S = 24 * 3600.0

GONE = 410  # the receiver asks never to be called again

log = structlog.get_logger(__name__)


class Undelivered(Exception):
    """An attempt failed: why, in words for the log."""


class Hopeless(Undelivered):
    """No later attempt can succeed."""


def retry_in_s(tries: int) -> float:
    """How long to wait after so many failed attempts."""
    wait_s: float = min(FIRST_RETRY_S * RETRY_FACTOR ** min(tries - 1, 20), LONGEST_RETRY_S)
    return wait_s * random.uniform(0.75, 1.25)


class WebhookCourier:
    """Delivers what is due, for ever.

    Args:
        queue: whose outbox.
        guard: where messages may go.
        links: URLs of the pictures in a message.
        secret: signs the messages of callers without an API key; "": the one in Redis.
        lease_s: how long a delivery is this courier's; longer than an attempt takes.
        attempt_s: how long an attempt may take.
        tls: whom to trust; for tests.
    """

    def __init__(
        self,
        queue: JobQueue,
        guard: WebhookGuard,
        links: ImageLinks,
        secret: str = "",
        *,
        lease_s: float = LEASE_S,
        attempt_s: float = ATTEMPT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._queue = queue
        self._guard = guard
        self._links = links
        self._secret = secret
        self._lease_s = lease_s
        self._attempt_s = attempt_s
        self._tls = tls
        self._ring = KeyRing(queue)
        self._in_flight: dict[asyncio.Task[None], str] = {}

    async def run(self) -> None:
        """Deliver until cancelled; whatever goes wrong is logged."""
        try:
            while True:
                full = False
                try:
                    full = await self.turn()
                except QueueUnavailable as error:
                    log.warning("queue away", doing="webhooks", reason=error.detail)
                except Exception:
                    log.exception("webhooks failed")
                await asyncio.sleep(0.05 if full else random.uniform(*POLL_S))
        finally:
            for task in self._in_flight:
                task.cancel()

    async def turn(self) -> bool:
        """Begin what is due and fits; whether there may be more. Raises QueueUnavailable."""
        room = MAX_IN_FLIGHT - len(self._in_flight)
        taken = await self._queue.take_deliveries(room, self._lease_s) if room > 0 else []
        busy = Counter(self._in_flight.values())
        for delivery in taken:
            if busy[delivery.key_hash] >= MAX_PER_CALLER:
                await self._queue.put_back_delivery(delivery, TURN_AWAY_S)
                continue
            busy[delivery.key_hash] += 1
            task = asyncio.create_task(self._attend(delivery))
            self._in_flight[task] = delivery.key_hash
            task.add_done_callback(self._in_flight.pop)
        return len(taken) == room

    async def idle(self) -> None:
        """Return once nothing is on its way."""
        while self._in_flight:
            await asyncio.wait(set(self._in_flight))

    async def _attend(self, delivery: Delivery) -> None:
        """Make one attempt and say how it went. Raises nothing: nobody would hear of it."""
        told = {"job": delivery.job_id, "tries": delivery.tries}
        again_s: float | None = None
        try:
            status = await self._deliver(delivery)
            metrics.webhook_deliveries.labels("delivered").inc()
            log.info("webhook delivered", status=status, **told)
        except (Undelivered, ForbiddenTarget, LookupFailed) as error:
            again_s = retry_in_s(delivery.tries)
            if isinstance(error, Hopeless) or delivery.age_s + again_s > GIVE_UP_S:
                again_s = None
            metrics.webhook_deliveries.labels("given-up" if again_s is None else "retry").inc()
            log.warning("webhook failed", reason=str(error), retry_in_s=again_s, **told)
        except QueueUnavailable as error:
            log.warning("queue away", doing="webhooks", reason=error.detail)
            return  # the lease ends, and somebody tries again
        except Exception:
            log.exception("webhook failed", **told)
            return
        try:
            await self._queue.settle_delivery(delivery, again_s)
        except QueueUnavailable as error:
            log.warning("queue away", doing="webhooks", reason=error.detail)

    async def _deliver(self, delivery: Delivery) -> int:
        """Call the webhook once; returns the status of a success.

        Raises Undelivered, ForbiddenTarget, LookupFailed or QueueUnavailable.
        """
        secret = await self._secret_of(delivery)
        body = await self._message(delivery)
        target = parse_target(delivery.url)
        addresses = await self._guard.resolve(target)
        # A host with several addresses gets each its turn.
        address = addresses[(delivery.tries - 1) % len(addresses)]
        headers = {"Host": target.host_header, "Content-Type": "application/json",
                   "User-Agent": "lumina-serve", **sign(secret, delivery.job_id, body)}  # fmt: skip
        try:
            async with asyncio.timeout(self._attempt_s):
                status = await self._post(target.url_at(address), target.host, headers, body)
        except TimeoutError:
            raise Undelivered(f"no answer within {self._attempt_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Undelivered(type(error).__name__) from None
        if status == GONE:
            raise Hopeless("status 410")
        if not 200 <= status < 300:  # a redirect could lead anywhere
            raise Undelivered(f"status {status}")
        return status

    async def _post(self, url: str, host: str, headers: dict[str, str], body: str) -> int:
        """POST to an address; returns the status. The answer's body is never read.

        Every call has its own client: nothing of an answer, such as a cookie, reaches the next.
        """
        async with (
            httpx.AsyncClient(
                verify=self._tls or _trusted(),
                trust_env=False,
                follow_redirects=False,
                timeout=CONNECT_S,
            ) as client,
            client.stream(
                "POST",
                url,
                content=body.encode(),
                headers=headers,
                extensions={"sni_hostname": host},
                timeout=httpx.Timeout(self._attempt_s, connect=CONNECT_S),
            ) as answer,
        ):
            return answer.status_code

    async def _secret_of(self, delivery: Delivery) -> str:
        if not delivery.key_hash:
            return self._secret or await anonymous_webhook_secret(self._queue)
        key = await self._ring.get(delivery.key_hash)
        if key is None:
            raise Hopeless("the API key was revoked: nothing signs this")
        return key.webhook_secret

    async def _message(self, delivery: Delivery) -> str:
        """What the receiver is told: the same fields as `GET /jobs/{id}`."""
        await self._links.prepare()
        record = await self._queue.get(delivery.job_id)
        data: dict[str, object] = {"id": delivery.job_id, "status": delivery.status}
        at = datetime.now(UTC).timestamp() - delivery.age_s
        if record is not None:  # otherwise it was deleted
            data = job_answer(record, self._links).model_dump()
            at = (record.finished_ms or 0) / 1000
        message = {
            "type": f"job.{delivery.status}",
            "timestamp": rfc3339(round(at * 1000)),
            "data": data,
        }
        return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


@cache
def _trusted() -> ssl.SSLContext:
    """Certificates of the public authorities, or of SSL_CERT_FILE; read once, for it takes long."""
    return httpx.create_ssl_context()


def sign(secret: str, job_id: str, body: str) -> dict[str, str]:
    """Return the headers that prove who sent `body`. A job ends once: its id names the message."""
    now = datetime.now(UTC)
    message_id = f"msg_{job_id}"
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign(message_id, now, body),
    }
