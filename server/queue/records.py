"""What the queue hands out, read from Redis's fields: claims for workers, records for callers."""

from dataclasses import dataclass
from typing import Any, Literal

from server.protocol import JobError, JobRecord, JobResult, JobSpec, Priority

# A claim holds; its job was canceled or is too late; it has ended itself; the job is another's.
ClaimState = Literal["held", "canceled", "expired", "ended", "lost"]

WORKER_LOST = JobError(
    code="worker-lost", detail="the worker running this job died, on every attempt it was given"
)
DEADLINE_MISSED = JobError(code="deadline", detail="the job did not end by its deadline")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A worker's right to run a job. `waited_ms` is the time from submission to this claim,
    `left_ms` from there to its deadline, if it has one.

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
    priority: Priority = "normal"
    left_ms: int | None = None

    @property
    def key(self) -> str:
        """Names the claim within a worker, which may hold two claims of one job in turn."""
        return f"{self.job_id}/{self.claim_no}"

    @property
    def fence(self) -> tuple[str, int, str]:
        """What every write under this claim must carry."""
        return self.job_id, self.claim_no, self.worker


def claim_of(worker: str, answer: list[Any]) -> Claim:
    """Read one element of the claim script's answer; raises ProtocolError for its specification."""
    job_id, claim_no, attempts, tenant, solo, waited_ms, cost_ms, spec_json, priority, left_ms = (
        answer
    )
    return Claim(
        job_id=job_id,
        claim_no=claim_no,
        worker=worker,
        attempts=attempts,
        tenant=tenant,
        solo=solo == "1",
        waited_ms=waited_ms,
        cost_ms=int(cost_ms),
        spec=JobSpec.from_json(spec_json),
        priority=priority,
        left_ms=left_ms if left_ms >= 0 else None,
    )


def record_of(
    job_id: str, fields: dict[str, str], position: int | None, start_ms: int | None = None
) -> JobRecord:
    """Read the hash of a job; raises ProtocolError for what this version cannot read."""

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
        step=int(fields.get("step", 0)),
        total=int(fields["total"]),
        position=position,
        attempts=int(fields["attempts"]),
        claim_no=int(fields["claim_no"]),
        worker=fields["worker"] or None,
        submitted_ms=int(fields["submitted_ms"]),
        started_ms=number("started_ms"),
        finished_ms=number("finished_ms"),
        expires_ms=number("expires_ms"),
        deadline_ms=number("deadline_ms"),
        retry_of=fields.get("retry_of"),
        start_ms=start_ms,
        error=JobError.from_json(fields["error"]) if ended and "error" in fields else None,
        result=JobResult.from_json(fields["result"]) if "result" in fields else None,
    )
