"""JobQueue: the typed face of the queue scripts. Every method is one atomic transition or a read.

Statuses go queued -> running -> succeeded | failed | canceled | expired, and back to queued after
a release, a retry or a lost lease; a job gets exactly one terminal status. Every claim carries a
`claim_no` that only grows; a write under an old one is refused.

All methods raise QueueUnavailable when Redis does not answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from server.config import Settings
from server.errors import InvalidRequest, NotFound, QueueFull
from server.protocol import (
    DEFAULT_POOL,
    DEFAULT_TENANT,
    PRIORITIES,
    JobError,
    JobRecord,
    JobResult,
    JobSpec,
    ModelInfo,
    Priority,
    ProtocolError,
    WorkerInfo,
    is_job_id,
    is_name,
)
from server.queue import keys
from server.queue.connection import MAX_BLOCK_S, connect, guarded, load_scripts
from server.queue.events import ChangeListener

if TYPE_CHECKING:
    from redis.asyncio import Redis

ClaimState = Literal["held", "canceled", "lost"]

WORKER_LOST = JobError(
    code="worker-lost", detail="the worker running this job died, on every attempt it was given"
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to run a job. `waited_ms` is the time from submission to this claim.

    A `solo` job was lost by an earlier worker: it may have killed it, so it runs alone.
    """

    job_id: str
    claim_no: int
    worker: str
    attempts: int
    tenant: str
    solo: bool
    waited_ms: int
    cost_ms: int
    spec: JobSpec

    @property
    def key(self) -> str:
        """Names the claim within a worker, which may hold two claims of one job in turn."""
        return f"{self.job_id}/{self.claim_no}"


class JobQueue:
    """The queue in one Redis. Use one instance per event loop.

    Args:
        redis: a client with decoded responses (`server.queue.connection.connect`).
        lease_s: how long a job stays with a silent worker.
        max_attempts: claims a job gets before it is dead.
        result_ttl: seconds a finished job is kept.
        queue_limit: queued jobs per pool, beyond which `submit` refuses.
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
        clock_ms: Callable[[], int] | None = None,
    ) -> None:
        self.redis = redis
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self.result_ttl = result_ttl
        self.queue_limit = queue_limit
        self._clock_ms = clock_ms
        self._scripts = load_scripts(redis)
        self._changes = ChangeListener(redis)
        self._jitter = random.Random()

    async def close(self) -> None:
        """Stop listening and close the connections."""
        await self._changes.close()
        await self.redis.aclose()

    # Callers ------------------------------------------------------------------------------------

    async def submit(
        self,
        job_id: str,
        spec: JobSpec,
        *,
        tenant: str = DEFAULT_TENANT,
        pool: str = DEFAULT_POOL,
        priority: Priority = "normal",
        cost_ms: float = 1000.0,
    ) -> JobRecord:
        """Queue a job and return its record; the same id again is the same job, unchanged.

        `cost_ms` is the estimated device time, by which tenants and priorities share fairly.
        Raises QueueFull at the depth limit, InvalidRequest for a malformed id or name.
        """
        if not is_job_id(job_id) or not is_name(tenant) or not is_name(pool):
            raise InvalidRequest(f"bad job id, tenant or pool: {job_id!r}, {tenant!r}, {pool!r}")
        if priority not in PRIORITIES:
            raise InvalidRequest(f"priority {priority!r} is not one of {', '.join(PRIORITIES)}")
        cost = max(1, round(cost_ms))
        answer = await self._run(
            "submit", job_id, spec.to_json(), tenant, pool, priority, cost, self.queue_limit
        )
        if answer == "full":
            raise QueueFull(f"the queue holds {self.queue_limit} jobs, its limit; try again later")
        record = await self.get(job_id)
        if record is None:
            raise NotFound(f"job {job_id} vanished from the queue right after it was submitted")
        return record

    async def get(self, job_id: str) -> JobRecord | None:
        """Return what is known of a job, or None if there is no such job (any more)."""
        if not is_job_id(job_id):
            return None
        fields = await guarded(self.redis.hgetall(keys.job(job_id)))
        if not fields:
            return None
        rank = None
        if fields["status"] == "queued":
            rank = await guarded(self.redis.zrank(keys.queued(fields["pool"]), job_id))
        return _record(job_id, fields, None if rank is None else rank + 1)

    async def cancel(self, job_id: str) -> JobRecord | None:
        """Cancel a job that has not ended; returns its record, None if there is no such job.

        A running job is canceled at once too; its worker drops it at its next step.
        """
        if not is_job_id(job_id):
            return None
        await self._run("cancel", job_id, self._result_ttl_ms)
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

    async def depth(self, pool: str = DEFAULT_POOL) -> int:
        """Return the number of queued jobs of a pool."""
        return int(await guarded(self.redis.zcard(keys.queued(pool))))

    # Workers ------------------------------------------------------------------------------------

    async def claim(
        self, worker_id: str, pool: str, max_jobs: int, max_cost: float, *, idle: bool = True
    ) -> list[Claim]:
        """Take up to `max_jobs` jobs whose costs sum to at most `max_cost` ms.

        `idle` says that the worker runs nothing: only then may it get a solo job, or a first one
        above `max_cost`. A specification this process cannot read fails its job.
        """
        answer = await self._run(
            "claim", worker_id, pool, max_jobs, round(max_cost), self._lease_ms, int(idle)
        )
        claims = []
        for job_id, claim_no, attempts, tenant, solo, waited_ms, cost_ms, spec_json in answer:
            fence = (job_id, claim_no, worker_id)
            try:
                spec = JobSpec.from_json(spec_json)
            except ProtocolError as error:
                await self._fail(fence, JobError(code="bad-spec", detail=str(error)), retry=False)
                continue
            claims.append(
                Claim(
                    job_id=job_id,
                    claim_no=claim_no,
                    worker=worker_id,
                    attempts=attempts,
                    tenant=tenant,
                    solo=solo == "1",
                    waited_ms=waited_ms,
                    cost_ms=int(cost_ms),
                    spec=spec,
                )
            )
        return claims

    async def heartbeat(
        self, worker_id: str, pool: str, claims: Sequence[Claim]
    ) -> list[tuple[Claim, ClaimState]]:
        """Renew the leases of `claims`; returns those that no longer hold, and why."""
        pairs = [part for claim in claims for part in (claim.job_id, claim.claim_no)]
        states = await self._run("heartbeat", worker_id, pool, self._lease_ms, *pairs)
        return [
            (claim, state) for claim, state in zip(claims, states, strict=True) if state != "held"
        ]

    async def sign_off(self, worker_id: str, pool: str) -> None:
        """Say that a worker is gone, ahead of its silence."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zrem(keys.workers(pool), worker_id)
            pipe.delete(keys.worker(worker_id))
            await guarded(pipe.execute())

    async def progress(self, claim: Claim, step: int, total: int) -> ClaimState:
        """Record that `step` of `total` is done; tells whether the claim still holds."""
        state: ClaimState = await self._run("progress", *_fence(claim), step, total)
        return state

    async def complete(self, claim: Claim, result: JobResult) -> bool:
        """Commit the result, whose blobs must be stored; False if the claim no longer holds."""
        steps = result.steps.computed + result.steps.skipped
        answer = await self._run(
            "complete", *_fence(claim), result.to_json(), self._result_ttl_ms, steps
        )
        return bool(answer)

    async def fail(self, claim: Claim, error: JobError, retry: bool) -> bool:
        """End the attempt: the job fails, or with `retry` gets another until it is dead."""
        return await self._fail(_fence(claim), error, retry)

    async def release(self, claim: Claim) -> bool:
        """Hand the job back unfinished; the attempt is not charged."""
        return bool(await self._run("release", *_fence(claim)))

    async def reap(self, limit: int = 100) -> int:
        """Take back jobs whose lease ended and wake those whose backoff is over.

        Returns the number of jobs taken back. Any process may call it at any time.
        """
        return int(
            await self._run(
                "reap", limit, self.max_attempts, self._draw_jitter(), WORKER_LOST.to_json()
            )
        )

    async def wait_for_work(self, pool: str, timeout_s: float) -> None:
        """Return when a job of the pool may be there to claim, at the latest after `timeout_s`."""
        timeout_s = min(timeout_s, MAX_BLOCK_S)
        await guarded(self.redis.blpop([keys.wake(pool)], timeout=timeout_s))

    # Pools --------------------------------------------------------------------------------------

    async def publish_model(self, pool: str, info: ModelInfo) -> None:
        """Tell the API what the workers of a pool serve."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.model(pool), "info", info.to_json())
            pipe.sadd(keys.POOLS, pool)
            await guarded(pipe.execute())

    async def model_info(self, pool: str = DEFAULT_POOL) -> ModelInfo | None:
        """Return what a pool serves, None as long as no worker has said so."""
        info = await guarded(self.redis.hget(keys.model(pool), "info"))
        return None if info is None else ModelInfo.from_json(info)

    async def pools(self) -> list[str]:
        """Return the names of the pools with a published model, sorted."""
        return sorted(await guarded(self.redis.smembers(keys.POOLS)))

    async def workers(self, pool: str = DEFAULT_POOL) -> list[WorkerInfo]:
        """Return the workers of a pool whose heartbeat is younger than the lease."""
        ids = await guarded(self.redis.zrange(keys.workers(pool), 0, -1))
        async with self.redis.pipeline(transaction=False) as pipe:
            for worker_id in ids:
                pipe.hgetall(keys.worker(worker_id))
            entries = await guarded(pipe.execute()) if ids else []
        return [
            WorkerInfo(
                id=worker_id,
                pool=entry["pool"],
                running=int(entry["running"]),
                beat_ms=int(entry["beat_ms"]),
            )
            for worker_id, entry in zip(ids, entries, strict=True)
            if entry
        ]

    async def ping(self) -> None:
        """Return if Redis answers, else raise QueueUnavailable."""
        await guarded(self.redis.ping())

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
            await self._run(
                "fail", *fence, error.to_json(), self._result_ttl_ms,
                int(retry), self.max_attempts, self._draw_jitter(),
            )
        )  # fmt: skip

    async def _run(self, name: str, *args: str | int) -> Any:
        """Run a script. The key names the shard; the scripts derive the rest from the prefix."""
        now = self._clock_ms() if self._clock_ms else 0
        return await guarded(self._scripts[name](keys=[keys.SEQ], args=[now, *args]))


def open_queue(settings: Settings) -> JobQueue:
    """Return the queue that `settings` describe; nothing is sent yet."""
    return JobQueue(
        connect(settings.redis_url),
        lease_s=settings.lease_s,
        max_attempts=settings.max_attempts,
        result_ttl=settings.result_ttl,
        queue_limit=settings.queue_limit,
    )


def _fence(claim: Claim) -> tuple[str, int, str]:
    return claim.job_id, claim.claim_no, claim.worker


def _record(job_id: str, fields: dict[str, str], position: int | None) -> JobRecord:
    def number(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    ended = "finished_ms" in fields
    return JobRecord(
        id=job_id,
        status=fields["status"],  # type: ignore[arg-type]
        tenant=fields["tenant"],
        pool=fields["pool"],
        priority=fields["priority"],  # type: ignore[arg-type]
        spec=JobSpec.from_json(fields["spec"]),
        step=int(fields["step"]),
        total=int(fields["total"]),
        position=position,
        attempts=int(fields["attempts"]),
        claim_no=int(fields["claim_no"]),
        worker=fields["worker"] or None,
        submitted_ms=int(fields["submitted_ms"]),
        started_ms=number("started_ms"),
        finished_ms=number("finished_ms"),
        expires_ms=number("expires_ms"),
        error=JobError.from_json(fields["error"]) if ended and "error" in fields else None,
        result=JobResult.from_json(fields["result"]) if "result" in fields else None,
    )
