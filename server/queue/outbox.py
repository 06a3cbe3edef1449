"""Outbox: which webhooks must still be told that a job has ended.

The script that ends a job leaves its delivery here in the same transition, so none is forgotten.
Whoever delivers takes what is due for a while, and says how it went; one that dies meanwhile has
only delayed its deliveries. After a day nobody tries any more.
"""

from dataclasses import dataclass

from server.queue import keys
from server.queue.connection import RedisLine


@dataclass(frozen=True)
class Delivery:
    """One webhook to call: job `job_id` ended with `status` so many seconds ago.

    `tries` counts this one too. `key_hash` names the API key whose secret signs it ("": none).
    """

    job_id: str
    url: str
    status: str
    tries: int
    age_s: float
    key_hash: str = ""


class Outbox(RedisLine):
    """Deliveries of all jobs. All methods raise QueueUnavailable when Redis does not answer."""

    async def take_deliveries(self, limit: int = 20, lease_s: float = 60.0) -> list[Delivery]:
        """Take up to `limit` deliveries that are due; unless settled they are due again."""
        taken = await self.run("outbox", limit, round(lease_s * 1000))
        return [
            Delivery(job_id, url, status, tries, age_ms / 1000, key_hash)
            for job_id, url, status, tries, age_ms, key_hash in taken
        ]

    async def settle_delivery(self, delivery: Delivery, retry_in_s: float | None) -> bool:
        """Say that it was delivered, or never will be (None), or when to try again.

        False if somebody else has taken it meanwhile.
        """
        wait_ms = -1 if retry_in_s is None else round(retry_in_s * 1000)
        return bool(await self.run("delivered", delivery.job_id, delivery.tries, wait_ms, 0))

    async def put_back_delivery(self, delivery: Delivery, retry_in_s: float) -> bool:
        """Give back a delivery that nobody has tried: this was no try."""
        wait_ms = round(retry_in_s * 1000)
        return bool(await self.run("delivered", delivery.job_id, delivery.tries, wait_ms, 1))

    async def num_deliveries(self) -> int:
        """Return how many are still to be made."""
        return int(await self.ask(self.redis.zcard(keys.OUTBOX)))
