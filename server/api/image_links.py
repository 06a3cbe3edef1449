"""ImageLinks: the URLs of pictures, signed where a browser could not show them otherwise."""

import time
from collections.abc import Mapping

from server.queue.connection import RedisLine
from server.queue.signing import UrlSigner, signing_secret

# A signed URL lives for one to two hours. It ends on the hour, so that asking again gives the same
# URL and a browser's cache knows it.
LIFETIME_S = 3600
# Then it is looked up again: Redis may have lost it, and another process made a new one.
SECRET_AGE_S = 30.0


class ImageLinks:
    """URLs of pictures on this server.

    Args:
        line: where the signing secret is.
        signed: whether URLs carry a signature: where a picture needs an API key otherwise.
    """

    def __init__(self, line: RedisLine, *, signed: bool) -> None:
        self._line = line
        self._signed = signed
        self._signer: UrlSigner | None = None
        self._looked_at = 0.0

    async def prepare(self) -> None:
        """Make `url` ready; raises QueueUnavailable."""
        if self._signed and time.monotonic() - self._looked_at > SECRET_AGE_S:
            self._signer = UrlSigner(await signing_secret(self._line))
            self._looked_at = time.monotonic()

    async def hold(self, path: str, query: Mapping[str, str]) -> bool:
        """Whether the signature in a request's query opens `path` now; raises QueueUnavailable."""
        await self.prepare()
        return self._signer is not None and self._signer.holds(path, query)

    def url(self, job_id: str, index: int) -> str:
        """Return the path and query of a job's picture."""
        path = f"/jobs/{job_id}/images/{index}"
        if not self._signed:
            return path
        assert self._signer is not None, "prepare comes first"
        now = time.time()
        return self._signer.sign(path, LIFETIME_S * (now // LIFETIME_S + 2) - now)
