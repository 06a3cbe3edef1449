"""Removes pictures nobody can reach: of stale claims, of jobs that ended without a result, and of
jobs whose record has expired. Record and pictures so live and end together.
"""

import asyncio
import time
from dataclasses import dataclass

import structlog

from server.protocol import JobResult, is_job_id
from server.queue import keys
from server.queue.blobs import BlobStore
from server.queue.jobs import JobQueue

log = structlog.get_logger(__name__)

LOCK_MS = 60_000


@dataclass(frozen=True)
class _Known:
    """What the queue knows of a job: `keep` is the one claim whose pictures may be needed."""

    exists: bool
    keep: int | None


async def sweep(queue: JobQueue, blobs: BlobStore) -> int:
    """Remove what nobody needs; returns how many claims' pictures went.

    One process at a time sweeps. After a loss of data nobody does, until an operator has accepted
    it. Pictures of unknown jobs stay as long as a result would: their record may come back with a
    restored Redis. Raises QueueUnavailable.
    """
    mine = await queue.ask(queue.redis.set(keys.SWEEP, 1, nx=True, px=LOCK_MS))
    if not mine or queue.data_lost:
        return 0
    removed = 0
    for tenant in await asyncio.to_thread(blobs.tenants):
        for job_id in await asyncio.to_thread(blobs.jobs, tenant):
            if is_job_id(job_id):
                removed += await _sweep_job(queue, blobs, tenant, job_id)
    if removed:
        log.info("pictures swept", claims=removed)
    return removed


async def _sweep_job(queue: JobQueue, blobs: BlobStore, tenant: str, job_id: str) -> int:
    # The listing comes first: a claim made after it is not in it.
    stored = await asyncio.to_thread(blobs.claims, tenant, job_id)
    known = await _look_up(queue, job_id)
    stale = [claim for claim in stored if claim.claim_no != known.keep]
    if not known.exists:
        oldest = time.time() - queue.result_ttl
        stale = [claim for claim in stored if claim.modified_s <= oldest]
    for claim in stale:
        await asyncio.to_thread(blobs.remove_claim, claim)
    return len(stale)


async def _look_up(queue: JobQueue, job_id: str) -> _Known:
    names = ("status", "claim_no", "result")
    status, claim_no, result = await queue.ask(queue.redis.hmget(keys.job(job_id), *names))
    if status is None:
        return _Known(exists=False, keep=None)
    if status == "running":
        return _Known(exists=True, keep=int(claim_no))
    if status == "succeeded" and JobResult.from_json(result).images:
        return _Known(exists=True, keep=int(claim_no))
    return _Known(exists=True, keep=None)
