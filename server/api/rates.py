"""How many requests a key has left in this minute, and the header fields that say so.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` names the quota
and its window, `RateLimit` what remains and for how long.
"""

import math
import time
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from server.queue import keys
from server.queue.api_keys import ApiKey
from server.queue.connection import RedisLine

WINDOW_S = 60


@dataclass(frozen=True)
class Standing:
    """A key's requests: `limit` in a window, `remaining` of them, which ends in `reset_s`."""

    limit: int
    remaining: int
    reset_s: float
    exceeded: bool
    window_s: int = WINDOW_S

    def headers(self) -> dict[str, str]:
        """Return the fields of an answer."""
        return {
            "RateLimit-Policy": f'"requests";q={self.limit};w={self.window_s}',
            "RateLimit": f'"requests";r={self.remaining};t={math.ceil(self.reset_s)}',
        }


class Rates:
    """Counts requests in Redis, so that all API processes count together.

    A window begins with a key's first request and lasts a minute of Redis's clock, whatever the
    clocks of the API processes say.
    """

    def __init__(self, line: RedisLine) -> None:
        self._line = line
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=keys.RATES,
            connection_pool=line.redis.connection_pool,  # type: ignore[arg-type]
        )
        self._limiter = FixedWindowRateLimiter(storage)

    async def standing(self, key: ApiKey, *, hit: bool) -> Standing:
        """Return how a key stands, after counting a request with `hit`; raises QueueUnavailable."""
        assert key.rate is not None
        item = RateLimitItemPerMinute(key.rate)
        allowed = not hit or await self._line.ask(self._limiter.hit(item, key.id))
        reset_at, remaining = await self._line.ask(self._limiter.get_window_stats(item, key.id))
        # The library adds the rest of Redis's window to this machine's clock.
        reset_s = max(0.0, reset_at - time.time())
        return Standing(key.rate, remaining, reset_s, not allowed)
