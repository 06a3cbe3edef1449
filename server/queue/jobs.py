"""JobQueue: the typed face of the queue scripts. Every method is one atomic transition or a read.

Statuses go queued -> running -> succeeded | failed | canceled | expired, and back to queued after
a release, a retry or a lost lease; a job gets exactly one terminal status. Every claim carries a
`claim_no` that only grows; a write under an old one is refused.

All methods raise QueueUnavailable when Redis does not answer.
"""

import random
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from server.config import Settings
from server.errors import NotFound, QueueUnavailable
from server.protocol import JobError, JobRecord, JobResult, ProtocolError, is_job_id
from server.queue import keys
from server.queue.connection import MAX_BLOCK_S, connect
from server.queue.durability import Durability
from server.queue.events import EventStream
from server.queue.load import LoadBoard
from server.queue.outbox import Outbox
from server.queue.pools import PoolBoard
from server.queue.previews import PreviewBoard
from server.queue.records import (
    DEADLINE_MISSED,
    WORKER_LOST,
    Claim,
    ClaimState,
    claim_of,
)
from server.queue.submission import FrontDoor, Idempotency, TenantLimits, Webhook

if TYPE_CHECKING:
    from redis.asyncio import Redis

__all__ = [
    "WORKER_LOST", "Claim", "ClaimState", "Idempotency", "JobQueue", "TenantLimits", "Webhook",
    "open_queue",
]  # fmt: skip

log = structlog.get_logger(__name__)


class JobQueue(FrontDoor, PoolBoard, LoadBoard, PreviewBoard, Outbox, EventStream):
    """The queue in one Redis. Use one instance per event loop.

    Args:
        redis: a client with decoded responses (`server.queue.connection.connect`).
        lease_s: how long a job stays with a silent worker.
        max_attempts: claims a job gets before it is dead.
        result_ttl: seconds a finished job is kept.
        queue_limit: queued jobs per pool, beyond which `submit` refuses.
        tenant_limit: jobs of one tenant that have not ended, beyond which `submit` refuses.
        durability: what an acknowledged submission must have outlived (`server.queue.durability`).
        clock_ms: the time in ms instead of Redis's own; for tests.
    """

    def __init__(
        self,
        redis: "Redis",
        *,
        lease_s: float = 15.0,
        max_attempts: int = 3,
        result_ttl: int = 24 * 3600,
        queue_limit: int = 1000,
        tenant_limit: int = 512,
        durability: Durability = "everysec",
        clock_ms: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(redis, clock_ms)
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.result_ttl = result_ttl
        self.queue_limit = queue_limit
        self.tenant_limit = tenant_limit
        self.durability = durability
        self._jitter = random.Random()
        self._scan_cursor = 0

    # Callers ------------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> JobRecord | None:
        """Cancel a job that has not ended; returns its record, None if there is no such job.

        A running job is canceled at once too; its worker drops it at its next step.
        """
        if not is_job_id(job_id):
            return None
        self._note_seq(int(await self.run("cancel", job_id, self._result_ttl_ms)))
        return await self.get(job_id)

    async def wait(self, job_id: str, timeout_s: float) -> JobRecord:
        """Return the record once the job has ended, or the latest one after `timeout_s`.

        Raises NotFound when there is no such job.
        """
        async with self._changes.watch(job_id, timeout_s) as changes:
            record = await self.get(job_id)
            while record is not None and not record.finished and await changes.next():
                record = await self.get(job_id)
        if record is None:
            raise NotFound(f"there is no job {job_id}")
        return record

    # Workers ------------------------------------------------------------------------------------

    async def claim(
        self, worker_id: str, pool: str, max_jobs: int, max_cost: float, *, idle: bool = True
    ) -> list[Claim]:
        """Take up to `max_jobs` jobs whose costs sum to at most `max_cost` ms.

        `idle` says that the worker runs nothing: only then may it get a solo job, or a first one
        above `max_cost`. A specification this process cannot read fails its job.
        """
        answer = await self.run(
            "claim", worker_id, pool, max_jobs, round(max_cost), self._lease_ms, int(idle),
            self._result_ttl_ms, DEADLINE_MISSED.to_json(),
        )  # fmt: skip
        claims = []
        for taken in answer:
            try:
                claims.append(claim_of(worker_id, taken))
            except ProtocolError as error:
                await self._refuse_spec((taken[0], taken[1], worker_id), str(error))
        return claims

    async def _refuse_spec(self, fence: tuple[str, int, str], why: str) -> None:
        """Fail a job that cannot be read. If Redis is away meanwhile, its lease just ends: the
        claims taken beside it must not be lost for it."""
        log.error("unreadable job", job=fence[0], why=why)
        try:
            await self._fail(fence, JobError(code="bad-spec", detail=why), retry=False)
        except QueueUnavailable as error:
            log.warning("unreadable job not failed yet", job=fence[0], reason=error.detail)

    async def heartbeat(
        self, worker_id: str, pool: str, claims: Sequence[Claim], *, draining: bool = False
    ) -> list[tuple[Claim, ClaimState]]:
        """Renew the leases of `claims`; returns those that no longer hold, and why.

        A `draining` worker keeps its leases and is no longer listed among those that take work.
        """
        pairs = [part for claim in claims for part in (claim.job_id, claim.claim_no)]
        states = await self.run("heartbeat", worker_id, pool, self._lease_ms, int(draining), *pairs)
        return [
            (claim, state) for claim, state in zip(claims, states, strict=True) if state != "held"
        ]

    async def look(self, claims: Sequence[Claim]) -> list[bool]:
        """Return for each claim whether it seems to hold: one cheap read, many times a second.

        Where it does not, any write under the claim tells for certain, and why.
        """
        if not claims:
            return []
        async with self.redis.pipeline(transaction=False) as pipe:
            for claim in claims:
                pipe.hmget(keys.job(claim.job_id), ["status", "claim_no"])
            found = await self.ask(pipe.execute())
        wanted = (["running", str(claim.claim_no)] for claim in claims)
        return [fields == want for fields, want in zip(found, wanted, strict=True)]

    async def progress(self, claim: Claim, step: int, total: int) -> ClaimState:
        """Record that `step` of `total` is done; tells whether the claim still holds."""
        state: ClaimState = await self.run(
            "progress", *claim.fence, step, total, self._result_ttl_ms, DEADLINE_MISSED.to_json()
        )
        return state

    async def complete(self, claim: Claim, result: JobResult) -> bool:
        """Commit the result, whose blobs must be stored; False if the claim no longer holds."""
        steps = result.steps.computed + result.steps.skipped
        seq = int(
            await self.run("complete", *claim.fence, result.to_json(), self._result_ttl_ms, steps)
        )
        self._note_seq(seq)
        return seq > 0

    async def fail(self, claim: Claim, error: JobError, retry: bool) -> bool:
        """End the attempt: the job fails, or with `retry` gets another until it is dead."""
        return await self._fail(claim.fence, error, retry)

    async def release(self, claim: Claim) -> bool:
        """Hand the job back unfinished; the attempt is not charged."""
        return bool(await self.run("release", *claim.fence))

    async def wait_for_work(self, pool: str, timeout_s: float) -> bool:
        """Return when a job of the pool may be there to claim, at the latest after `timeout_s`;
        whether somebody said so."""
        timeout_s = min(timeout_s, MAX_BLOCK_S)
        return await self.ask(self.redis.blpop([keys.wake(pool)], timeout=timeout_s)) is not None

    # Any process --------------------------------------------------------------------------------

    async def reap(self, limit: int = 100) -> int:
        """Take back jobs whose lease ended, end those past their deadline, wake those whose
        backoff is over, and look whether data were lost.

        Returns the number of jobs taken back. Any process may call it at any time.
        """
        taken, epoch, seq, lost = await self.run(
            "reap", limit, self.max_attempts, self._draw_jitter(), WORKER_LOST.to_json(),
            self._lease_ms, self._result_ttl_ms, DEADLINE_MISSED.to_json(),
            self._epoch, self._seq, secrets.token_hex(8),
        )  # fmt: skip
        self._note_epoch(epoch, int(seq), lost)
        return int(taken)

    async def reconcile(self) -> int:
        """Look at some more of all jobs for running ones without a lease; returns those found."""
        self._scan_cursor, found = await self.ask(
            self.redis.scan(self._scan_cursor, match=f"{keys.job('*')}", count=500)
        )
        ids = [key.rsplit(":", 1)[1] for key in found]
        return int(await self.run("reconcile", *ids)) if ids else 0

    # --------------------------------------------------------------------------------------------

    @property
    def _lease_ms(self) -> int:
        return round(self.lease_s * 1000)

    @property
    def _result_ttl_ms(self) -> int:
        return self.result_ttl * 1000

    def _draw_jitter(self) -> str:
        return f"{self._jitter.uniform(0.75, 1.25):.3f}"

    async def _fail(self, fence: tuple[str, int, str], error: JobError, retry: bool) -> bool:
        return bool(
            await self.run(
                "fail", *fence, error.to_json(), self._result_ttl_ms,
                int(retry), self.max_attempts, self._draw_jitter(),
            )
        )  # fmt: skip


def open_queue(settings: Settings) -> JobQueue:
    """Return the queue that `settings` describe; nothing is sent yet."""
    return JobQueue(
        connect(settings.redis_url),
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        result_ttl=settings.result_ttl,
        queue_limit=settings.queue_limit,
        tenant_limit=settings.tenant_limit,
        durability=settings.durability,
    )
