"""Erases a job: its end stays on record, its words and pictures do not."""

import asyncio
import dataclasses

from server.protocol import JobError, JobRecord, JobResult, JobSpec
from server.queue.blobs import BlobStore
from server.queue.jobs import JobQueue

ERASED = "what this said was erased with the job"


async def erase(queue: JobQueue, blobs: BlobStore, job_id: str) -> JobRecord | None:
    """Cancel a job that has not ended, then erase its words and pictures; safe to repeat.

    Returns what is left of it, None if there is no such job. Raises QueueUnavailable, and
    BlobUnavailable where pictures could not be removed: then nothing says that they were.
    """
    # Once it has ended, nobody else changes it: a worker's late pictures are refused and removed.
    record = await queue.cancel(job_id)
    if record is None:
        return None
    await asyncio.to_thread(blobs.remove_job, record.tenant, job_id)
    await queue.run(
        "erase", job_id, _without_words(record.spec).to_json(), _without_pictures(record.result),
        _without_reason(record.error), record.spec.num_images, record.spec.partial_images,
    )  # fmt: skip
    return await queue.get(job_id)


def _without_words(spec: JobSpec) -> JobSpec:
    return dataclasses.replace(
        spec, prompt="", negative_prompt=None, system_prompt=None, panel=None, metadata=None
    )


def _without_pictures(result: JobResult | None) -> str:
    if result is None:
        return ""
    return dataclasses.replace(result, images=(), warnings=()).to_json()  # warnings quote prompts


def _without_reason(error: JobError | None) -> str:
    return JobError(code=error.code, detail=ERASED).to_json() if error else ""
