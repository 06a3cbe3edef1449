"""The history checker: what every run must show, whatever was done to it."""

import hashlib
from dataclasses import dataclass, field

from server.errors import ServerError
from server.protocol import TERMINAL_STATUSES, JobRecord
from server.queue import keys
from server.queue.blobs import BlobStore
from server.queue.jobs import JobQueue


@dataclass
class Verdict:
    """Of `jobs` acknowledged: how many are lost, ended twice, or ended as they should not; and how
    many succeeded without a readable picture of the right hash."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not (self.lost or self.duplicate or self.unexpected or self.unreadable)


async def judge(
    queue: JobQueue,
    acknowledged: list[str],
    allowed: tuple[str, ...] = ("succeeded",),
    blobs: BlobStore | None = None,
) -> Verdict:
    """Each acknowledged job has exactly one terminal status, and one of the allowed ones.

    The job's record says how it ended, its event stream how often. With `blobs`, every success has
    its pictures.
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
        elif blobs is not None and record.status == "succeeded" and not readable(record, blobs):
            verdict.unreadable.append(job_id)
    return verdict


def readable(record: JobRecord, blobs: BlobStore) -> bool:
    """Whether every picture of a success is there, with the bytes it was stored with."""
    if record.result is None or not record.result.images:
        return False
    try:
        return all(
            hashlib.sha256(blobs.get(image.path)).hexdigest() == image.sha256
            for image in record.result.images
        )
    except ServerError:
        return False


async def story(queue: JobQueue, job_id: str) -> list[str]:
    """The types of a job's events in order."""
    return [fields["type"] for _, fields in await queue.redis.xrange(keys.events(job_id))]


async def queued_ms(queue: JobQueue, job_id: str) -> list[int]:
    """When a job entered the queue, the first time or again, in ms of the Redis clock."""
    entries = await queue.redis.xrange(keys.events(job_id))
    return [int(at.split("-")[0]) for at, fields in entries if fields["type"] == "queued"]
