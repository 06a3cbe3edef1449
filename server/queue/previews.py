"""PreviewBoard: pictures of a job while it runs, for those who look; each lives for a minute."""

from collections.abc import Sequence

from redis.client import NEVER_DECODE

from server.queue import keys
from server.queue.connection import RedisLine
from server.queue.records import Claim, ClaimState


class PreviewBoard(RedisLine):
    """Previews and partial pictures: encoded files of at most 64 KiB.

    A worker makes them only for jobs somebody watches, and may go on without: they are the first
    thing a Redis short of memory refuses. All methods raise QueueUnavailable.
    """

    async def watch(self, job_id: str) -> None:
        """Say for the next minute that somebody looks at the job's previews."""
        await self.ask(self.redis.set(keys.watch(job_id), 1, px=keys.PREVIEW_TTL_MS))

    async def watched(self, job_ids: Sequence[str]) -> set[str]:
        """Return which of the jobs somebody looks at."""
        if not job_ids:
            return set()
        looks = await self.ask(self.redis.mget([keys.watch(job_id) for job_id in job_ids]))
        return {job_id for job_id, look in zip(job_ids, looks, strict=True) if look is not None}

    async def put_preview(self, claim: Claim, picture: bytes) -> ClaimState:
        """Replace the job's latest preview; refused unless the claim holds, whose state it tells.

        Raises ValueError for more than 64 KiB.
        """
        return await self._put(claim, "", picture)

    async def put_partial(
        self, claim: Claim, image: int, number: int, picture: bytes
    ) -> ClaimState:
        """Keep partial picture `number` (from 0) of the job's picture `image`; as `put_preview`."""
        return await self._put(claim, f":{image}:{number}", picture)

    async def preview(self, job_id: str) -> bytes | None:
        """Return the job's latest preview, if there is one."""
        return await self._read(keys.preview(job_id))

    async def partial(self, job_id: str, image: int, number: int) -> bytes | None:
        """Return a partial picture, if it is there."""
        return await self._read(keys.partial(job_id, image, number))

    async def _put(self, claim: Claim, name: str, picture: bytes) -> ClaimState:
        if len(picture) > keys.PREVIEW_LIMIT_BYTES:
            raise ValueError(
                f"a preview has at most {keys.PREVIEW_LIMIT_BYTES} bytes, got {len(picture)}"
            )
        state: ClaimState = await self.run("preview", *claim.fence, name, picture)
        return state

    async def _read(self, key: str) -> bytes | None:
        # The client decodes answers as text; this one is a picture.
        call = self.redis.execute_command("GET", key, **{NEVER_DECODE: True})  # type: ignore[no-untyped-call]
        picture: bytes | None = await self.ask(call)
        return picture
