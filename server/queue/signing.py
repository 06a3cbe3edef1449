"""UrlSigner: picture URLs that work without a key, for a while.

A signature covers the path and the time it ends at, so neither can be changed. It is an HMAC-SHA256
under a secret that all API processes share; a new secret makes every earlier URL worthless.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from server.queue import keys
from server.queue.connection import RedisLine

SECRET_BYTES = 32


class UrlSigner:
    """Signs paths of this server.

    Args:
        secret: shared by all that sign and check.
        now_s: the Unix time; for tests.
    """

    def __init__(self, secret: str, now_s: Callable[[], float] = time.time) -> None:
        assert secret, "a signature without a secret protects nothing"
        self._secret = secret.encode()
        self._now_s = now_s

    def sign(self, path: str, lifetime_s: float) -> str:
        """Return the path with the query that lets anybody read it for `lifetime_s`."""
        expires = str(int(self._now_s() + lifetime_s))
        query = {"expires": expires, "signature": self._signature(path, expires)}
        return f"{path}?{urlencode(query)}"

    def holds(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether the query of a request for `path` has a signature that holds, and holds still."""
        expires, signature = query.get("expires", ""), query.get("signature", "")
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 15):
            return False
        right = hmac.compare_digest(signature.encode(), self._signature(path, expires).encode())
        return right and int(expires) > self._now_s()

    def _signature(self, path: str, expires: str) -> str:
        return hmac.new(self._secret, f"{expires}\n{path}".encode(), hashlib.sha256).hexdigest()


async def signing_secret(line: RedisLine) -> str:
    """Return the secret that all processes on this Redis share; the first to ask makes it.

    Raises QueueUnavailable.
    """
    fresh = secrets.token_hex(SECRET_BYTES)
    await line.ask(line.redis.set(keys.SIGNING, fresh, nx=True))
    secret: str = await line.ask(line.redis.get(keys.SIGNING))
    return secret
