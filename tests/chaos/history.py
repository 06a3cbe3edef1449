"""The history checker: what every run must show, whatever was done to it."""

from dataclasses import dataclass, field

from server.protocol import TERMINAL_STATUSES
from server.queue import keys
from server.queue.jobs import JobQueue


@dataclass
class Verdict:
    """Of `jobs` acknowledged: how many are lost, ended twice, or ended as they should not."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not (self.lost or self.duplicate or self.unexpected)


async def judge(
    queue: JobQueue, acknowledged: list[str], allowed: tuple[str, ...] = ("succeeded",)
) -> Verdict:
    """Each acknowledged job has exactly one terminal status, and one of the allowed ones.

    The job's record says how it ended, its event stream how often.
    """
    verdict = Verdict(jobs=len(acknowledged))
    for job_id in acknowledged:
        record = await queue.get(job_id)
        if record is None or not record.finished:
            verdict.lost.append(job_id)
            continue
        ends = [event for event in await story(queue, job_id) if event in TERMINAL_STATUSES]
        if len(ends) != 1 or ends[0] != record.status:
            verdict.duplicate.append(job_id)
        elif record.status not in allowed:
            verdict.unexpected.append(job_id)
    return verdict


async def story(queue: JobQueue, job_id: str) -> list[str]:
    """The types of a job's events in order."""
    return [fields["type"] for _, fields in await queue.redis.xrange(keys.events(job_id))]


async def queued_ms(queue: JobQueue, job_id: str) -> list[int]:
    """When a job entered the queue, the first time or again, in ms of the Redis clock."""
    entries = await queue.redis.xrange(keys.events(job_id))
    return [int(at.split("-")[0]) for at, fields in entries if fields["type"] == "queued"]
