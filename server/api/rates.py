"""What a key has left of its requests a minute and its jobs a day, and the headers that say so.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` names each quota
and its window, `RateLimit` what remains of it and for how long.
"""

import math
import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from server.queue import keys
from server.queue.api_keys import ApiKey
from server.queue.jobs import JobQueue

MINUTE_S = 60
DAY_S = 24 * 3600


@dataclass(frozen=True)
class Standing:
    """How a key stands with a quota: `remaining` of `limit` in a window that ends in `reset_s`."""

    policy: str
    limit: int
    remaining: int
    window_s: int
    reset_s: int


class Rates:
    """Counts requests in Redis, so that all API processes count together.

    A window begins with a key's first request and lasts a minute of Redis's clock, whatever the
    clocks of the API processes say. Jobs are counted where they are submitted. All methods raise
    QueueUnavailable when Redis does not answer.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=keys.RATES,
            connection_pool=queue.redis.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = FixedWindowRateLimiter(storage)

    async def hit(self, key: ApiKey) -> bool:
        """Count a request; whether the key may make it."""
        if key.rate is None:
            return True
        item = RateLimitItemPerMinute(key.rate)
        return bool(await self._queue.ask(self._limiter.hit(item, key.id)))

    async def requests(self, key: ApiKey) -> Standing | None:
        """How a key stands with its requests a minute; None where it may make any number."""
        if key.rate is None:
            return None
        item = RateLimitItemPerMinute(key.rate)
        ends, remaining = await self._queue.ask(self._limiter.get_window_stats(item, key.id))
        # The library adds the rest of Redis's window to this machine's clock.
        reset_s = max(0, math.ceil(ends - time.time()))
        return Standing("requests", key.rate, remaining, MINUTE_S, reset_s)

    async def jobs(self, key: ApiKey) -> Standing | None:
        """How a key's tenant stands with its jobs a day; None where it may submit any number."""
        if key.daily_jobs is None:
            return None
        used = await self._queue.usage(key.tenant)
        remaining = max(0, key.daily_jobs - used.jobs)
        return Standing("jobs", key.daily_jobs, remaining, DAY_S, used.resets_in_s)

    async def headers(self, key: ApiKey) -> dict[str, str]:
        """Return the fields for an answer to a key; none for one without quotas."""
        standings = [s for s in (await self.requests(key), await self.jobs(key)) if s is not None]
        if not standings:
            return {}
        return {
            "RateLimit-Policy": ", ".join(
                f'"{s.policy}";q={s.limit};w={s.window_s}' for s in standings
            ),
            "RateLimit": ", ".join(
                f'"{s.policy}";r={s.remaining};t={s.reset_s}' for s in standings
            ),
        }
