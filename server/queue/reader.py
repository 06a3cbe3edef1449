"""JobReader: what the queue knows of jobs, without changing any."""

import re
from dataclasses import dataclass
from typing import Any

from server.protocol import DEFAULT_POOL, DEFAULT_TENANT, JobRecord, is_job_id
from server.queue import keys
from server.queue.connection import RedisLine
from server.queue.records import record_of

CURSOR = re.compile(r"\d{1,15}")
LIST_PAGE = 100  # entries looked at in one round trip while a listing is filtered


@dataclass(frozen=True)
class JobPage:
    """Some of a tenant's jobs, the newest first; `cursor` continues, None at the end."""

    records: list[JobRecord]
    cursor: str | None


@dataclass(frozen=True)
class Usage:
    """What a tenant has submitted on the UTC day of `now_ms`: jobs, and their estimated device time
    in ms."""

    jobs: int
    cost_ms: int
    now_ms: int

    @property
    def resets_ms(self) -> int:
        """When the next day begins."""
        return (self.now_ms // keys.DAY_MS + 1) * keys.DAY_MS

    @property
    def resets_in_s(self) -> int:
        """Whole seconds until then, at least 1."""
        return -(-(self.resets_ms - self.now_ms) // 1000)


class JobReader(RedisLine):
    """Reads. All methods raise QueueUnavailable when Redis does not answer."""

    async def get(self, job_id: str) -> JobRecord | None:
        """Return what is known of a job, or None if there is no such job (any more)."""
        if not is_job_id(job_id):
            return None
        return self.read_record(job_id, await self.run("record", job_id))

    @staticmethod
    def read_record(job_id: str, found: list[Any]) -> JobRecord | None:
        """Read what the scripts say of a job; None if there is none."""
        flat, rank, start_ms = found
        if not flat:
            return None
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return record_of(job_id, fields, None if rank is None else rank + 1, start_ms)

    async def list_jobs(
        self,
        tenant: str = DEFAULT_TENANT,
        *,
        status: str | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> JobPage:
        """Return a tenant's jobs, the newest first: those open, and those not older than results.

        Args:
            tenant: whose jobs.
            status: only jobs of this status.
            limit: at most so many.
            cursor: of the page before; anything else begins anew.
        """
        records: list[JobRecord] = []
        before = f"({cursor}" if cursor and CURSOR.fullmatch(cursor) else "+inf"
        while True:
            found = await self.ask(
                self.redis.zrevrangebyscore(
                    keys.listed(tenant), before, "-inf", 0, LIST_PAGE, withscores=True
                )
            )
            for job_id, seq in found:
                record = await self.get(job_id)
                if record is not None and status in (None, record.status):
                    records.append(record)
                before = f"({int(seq)}"
                if len(records) == limit:
                    return JobPage(records, str(int(seq)))
            if len(found) < LIST_PAGE:
                return JobPage(records, None)

    async def usage(self, tenant: str = DEFAULT_TENANT) -> Usage:
        """Return what a tenant has submitted today, by Redis's clock."""
        seconds, _ = await self.ask(self.redis.time())
        now_ms = self._now() or seconds * keys.SECOND_MS
        used = keys.usage(tenant, now_ms // keys.DAY_MS)
        jobs, cost_ms = await self.ask(self.redis.hmget(used, "jobs", "cost_ms"))
        return Usage(int(jobs or 0), int(cost_ms or 0), now_ms)

    async def depth(self, pool: str = DEFAULT_POOL) -> int:
        """Return the number of queued jobs of a pool."""
        return int(await self.ask(self.redis.zcard(keys.queued(pool))))

    async def queued_work_ms(self, pool: str = DEFAULT_POOL) -> int:
        """Return the estimated device time of the queued jobs of a pool."""
        return sum(map(int, await self.ask(self.redis.hvals(keys.work(pool)))))

    async def open_jobs(self, tenant: str = DEFAULT_TENANT) -> int:
        """Return the number of a tenant's jobs that have not ended."""
        return int(await self.ask(self.redis.zcard(keys.open_jobs(tenant))))

    async def stats(self) -> dict[str, int]:
        """Return the counts of fenced writes and reclaimed jobs since the beginning."""
        counts = await self.ask(self.redis.hgetall(keys.STATS))
        return {name: int(counts.get(name, 0)) for name in ("fenced", "reclaimed")}
