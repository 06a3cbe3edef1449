"""FrontDoor: admits jobs, or says why not. Nothing that is refused leaves a trace."""

from dataclasses import dataclass

from server.errors import (
    DeadlineTooShort,
    IdempotencyMismatch,
    InvalidRequest,
    QueueFull,
    QuotaExceeded,
    ServerError,
    TooManyJobs,
)
from server.protocol import (
    DEFAULT_POOL,
    DEFAULT_TENANT,
    PRIORITIES,
    JobRecord,
    JobSpec,
    Priority,
    is_job_id,
    is_name,
)
from server.queue.durability import DurableLine
from server.queue.health import MAX_MEMORY_RATIO
from server.queue.reader import JobReader


@dataclass(frozen=True)
class Idempotency:
    """An Idempotency-Key and the body it came with, both as sha256 in hex."""

    key_hash: str
    body_hash: str


@dataclass(frozen=True)
class TenantLimits:
    """What one tenant may: jobs that have not ended (None: the queue's own limit), jobs a day.

    `weight` is its share of the workers beside tenants of weight 1.
    """

    open_jobs: int | None = None
    daily_jobs: int | None = None
    weight: int = 1


@dataclass(frozen=True)
class Webhook:
    """Where to tell of a job's end, and the hash of the API key whose secret signs that."""

    url: str
    key_hash: str = ""


class FrontDoor(DurableLine, JobReader):
    """Submission with its limits: see the arguments of `JobQueue`."""

    lease_s: float
    result_ttl: int
    queue_limit: int
    tenant_limit: int

    async def submit(
        self,
        job_id: str,
        spec: JobSpec,
        *,
        tenant: str = DEFAULT_TENANT,
        pool: str = DEFAULT_POOL,
        priority: Priority = "normal",
        cost_ms: float = 1000.0,
        deadline_s: float | None = None,
        idempotency: Idempotency | None = None,
        limits: TenantLimits | None = None,
        webhook: Webhook | None = None,
        watched: bool = False,
    ) -> JobRecord:
        """Queue a job and return its record; the same id again is the same job, unchanged.

        Args:
            job_id: made by the caller (`new_job_id`).
            spec: what to draw.
            tenant: whose job it is.
            pool: the workers that may run it.
            priority: its class.
            cost_ms: estimated device time, by which tenants and priorities share fairly.
            deadline_s: from now; a job that has not ended by then expires.
            idempotency: a key that was used before gives the job of that time.
            limits: the tenant's own.
            webhook: told of the job's end through the outbox.
            watched: previews are wanted from the first step on.

        Raises QueueFull, TooManyJobs, QuotaExceeded, DeadlineTooShort, IdempotencyMismatch (the key
        was used with another body) or InvalidRequest (a malformed id, name or deadline).
        """
        _check(job_id, tenant, pool, priority, deadline_s)
        deadline_ms = round(1000 * (deadline_s or 0))
        key = idempotency or Idempotency("", "")
        mine, hook = limits or TenantLimits(), webhook or Webhook("")
        open_jobs = self.tenant_limit if mine.open_jobs is None else mine.open_jobs
        await self._check_memory()
        answer = await self.run_durably(
            "submit", job_id, spec.to_json(), tenant, pool, priority, max(1, round(cost_ms)),
            self.queue_limit, open_jobs, deadline_ms, round(self.lease_s * 1000), key.key_hash,
            key.body_hash, self.result_ttl * 1000, mine.daily_jobs or 0, hook.url, int(watched),
            hook.key_hash, mine.weight,
        )  # fmt: skip
        state, _, seq, wait_ms, each_ms, found = answer
        if state not in ("queued", "exists"):
            late = state == "late" and _too_late(deadline_ms, wait_ms, cost_ms)
            raise late or self._refusal(state, wait_ms, each_ms, open_jobs, mine.daily_jobs)
        self._note_seq(seq)
        if state == "exists":
            record = self.read_record(answer[1], found)
            assert record is not None, answer[1]
            return record
        return _fresh(job_id, spec, tenant, pool, priority, deadline_ms, found)

    async def _check_memory(self) -> None:
        if await self.memory_ratio() > MAX_MEMORY_RATIO:
            raise QueueFull("the queue's memory is nearly used up; try again later")

    def _refusal(
        self, state: str, wait_ms: int, each_ms: int, open_jobs: int, daily_jobs: int | None
    ) -> ServerError:
        """Return why there is no such job."""
        # A tenth of the work done means room again, for some of those who come back.
        retry_after_s = each_ms / 1000 / 10
        if state == "full":
            sentence = f"the queue holds {self.queue_limit} jobs, its limit; try again later"
            return QueueFull(sentence, retry_after_s)
        if state == "tenant":
            sentence = f"you have {open_jobs} jobs that have not ended, the limit"
            return TooManyJobs(sentence, retry_after_s)
        if state == "quota":
            sentence = f"you have submitted {daily_jobs} jobs today (UTC), the limit"
            return QuotaExceeded(sentence, wait_ms / 1000)
        assert state == "mismatch", state
        return IdempotencyMismatch("this Idempotency-Key was used with another body")


def _check(job_id: str, tenant: str, pool: str, priority: str, deadline_s: float | None) -> None:
    if not is_job_id(job_id) or not is_name(tenant) or not is_name(pool):
        raise InvalidRequest(f"bad job id, tenant or pool: {job_id!r}, {tenant!r}, {pool!r}")
    if priority not in PRIORITIES:
        raise InvalidRequest(f"priority {priority!r} is not one of {', '.join(PRIORITIES)}")
    if deadline_s is not None and round(deadline_s * 1000) < 1:
        raise InvalidRequest(f"deadline_s must be at least 0.001, got {deadline_s}")


def _fresh(
    job_id: str,
    spec: JobSpec,
    tenant: str,
    pool: str,
    priority: Priority,
    deadline_ms: int,
    found: tuple[int, int, int],
) -> JobRecord:
    """The record of a job that was queued just now, as the script has `found` it."""
    now, rank, start_ms = found
    return JobRecord(
        id=job_id, status="queued", tenant=tenant, pool=pool, priority=priority, spec=spec,
        step=0, total=0, position=rank + 1, attempts=0, claim_no=0, worker=None,
        submitted_ms=now, started_ms=None, finished_ms=None, expires_ms=None, error=None,
        result=None, deadline_ms=now + deadline_ms if deadline_ms else None, start_ms=start_ms,
    )  # fmt: skip


def _too_late(deadline_ms: int, wait_ms: int, cost_ms: float) -> DeadlineTooShort:
    sentence = (
        f"deadline_s {deadline_ms / 1000:g} is too short: the estimated wait is "
        f"{wait_ms / 1000:.1f} s, and the job then takes about {cost_ms / 1000:.1f} s"
    )
    return DeadlineTooShort(sentence, wait_ms / 1000)
