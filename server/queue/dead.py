"""DeadLetters: the jobs that used up their attempts, for operators."""

from server.protocol import JobRecord, new_job_id
from server.queue import keys
from server.queue.jobs import JobQueue


class DeadLetters:
    """A view of a queue's dead-letter set: at most 10 000 jobs, kept for 7 days.

    All methods raise QueueUnavailable when Redis does not answer.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    async def count(self) -> int:
        """Return how many there are."""
        return int(await self._queue.ask(self._queue.redis.zcard(keys.DEAD)))

    async def ids(self, limit: int = 100) -> list[str]:
        """Return their ids, the latest first."""
        found: list[str] = await self._queue.ask(
            self._queue.redis.zrevrange(keys.DEAD, 0, limit - 1)
        )
        return found

    async def records(self, limit: int = 100) -> list[JobRecord]:
        """Return their records, the latest first."""
        records = [await self._queue.get(job_id) for job_id in await self.ids(limit)]
        return [record for record in records if record is not None]

    async def record(self, job_id: str) -> JobRecord | None:
        """Return the record of a dead job, None if it is not among the dead."""
        score = await self._queue.ask(self._queue.redis.zscore(keys.DEAD, job_id))
        return None if score is None else await self._queue.get(job_id)

    async def retry(self, job_id: str) -> str | None:
        """Queue a new job that names the dead one; returns its id, None if there is none dead.

        Limits of depth do not apply: there are few dead jobs, and an operator asks.
        """
        fresh = new_job_id()
        ttl_ms = self._queue.result_ttl * 1000
        return fresh if await self._queue.run("retry", job_id, fresh, ttl_ms) else None

    async def purge(self, *job_ids: str) -> int:
        """Forget dead jobs and their records; returns how many there were."""
        return int(await self._queue.run("purge", *job_ids)) if job_ids else 0
