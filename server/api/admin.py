"""`/admin/...`: dead letters, pools and workers, for callers of scope `admin`.

Which callers those are is decided in `server.api.auth`, by the path.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from starlette.requests import Request

from server.api.answers import ErrorAnswer, rfc3339
from server.api.context import context_of, promptly
from server.api.examples import DEAD, DEAD_DETAIL, POOL, PURGED, RETRIED, WORKER
from server.api.openapi import QUEUE, answer, problems
from server.api.schemas import printable
from server.errors import NotFound
from server.protocol import JobRecord, is_job_id
from server.queue.dead import DeadLetters

MAX_LISTED = 1000
LIST_S = 4.0  # a long list takes many questions
MAX_AT_ONCE = 100  # dead jobs that one request retries or purges: an answer must not take long

router = APIRouter(prefix="/admin", tags=["admin"])

_ANY = problems(*QUEUE)
_ONE = problems("not-found", *QUEUE)


class DeadJob(BaseModel):
    """A job that used up its attempts."""

    id: str
    tenant: str
    pool: str
    priority: str
    attempts: int
    submitted_at: str
    finished_at: str | None
    error: ErrorAnswer | None


class DeadJobDetail(DeadJob):
    """The same with what the job asked for, its prompt included."""

    spec: dict[str, Any]


class DeadList(BaseModel):
    """Dead jobs, the latest first."""

    count: int = Field(description="how many there are, listed or not")
    jobs: list[DeadJob]


class Retried(BaseModel):
    """The jobs that repeat dead ones: old id -> new id."""

    retried: dict[str, str]
    remaining: int


class Purged(BaseModel):
    """How many dead jobs were forgotten."""

    purged: int
    remaining: int


class WorkerState(BaseModel):
    """A worker that takes work."""

    id: str
    pool: str
    running: int
    beat_at: str


class PoolDetail(BaseModel):
    """What a pool serves and has to do."""

    name: str
    model: str | None
    model_hash: str | None
    queued: int
    workers: list[WorkerState]


@router.get(
    "/dead",
    responses=problems("invalid-request", *QUEUE)
    | {200: answer("Dead jobs", {"count": 1, "jobs": [DEAD]})},
    summary="Jobs that used up their attempts",
)
async def list_dead(
    request: Request, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100
) -> DeadList:
    """Dead jobs, the latest first, without their prompts."""
    dead = DeadLetters(context_of(request).queue)
    records = await promptly(dead.records(limit), LIST_S)
    count = await promptly(dead.count())
    return DeadList(count=count, jobs=[DeadJob(**_fields(record)) for record in records])


@router.get(
    "/dead/{job_id}",
    responses=_ONE | {200: answer("The dead job", DEAD_DETAIL)},
    summary="One dead job, with what it asked for",
)
async def show_dead(request: Request, job_id: str) -> DeadJobDetail:
    """Why a job died and what it asked for. This shows its prompt."""
    record = await _dead(request, job_id)
    spec = {name: value for name, value in vars(record.spec).items() if value is not None}
    return DeadJobDetail(**_fields(record), spec=spec)


@router.post(
    "/dead/{job_id}/retry",
    responses=_ONE | {200: answer("The new job", RETRIED)},
    summary="Queue a dead job anew",
)
async def retry_dead(request: Request, job_id: str) -> Retried:
    """A new job of the same tenant that names the old one."""
    await _dead(request, job_id)
    return await _retry(request, [job_id])


@router.post(
    "/dead/retry",
    responses=_ANY | {200: answer("The new jobs", RETRIED)},
    summary="Queue all dead jobs anew",
)
async def retry_all_dead(request: Request) -> Retried:
    """Up to a hundred at once; `remaining` tells whether to ask again."""
    ids = await promptly(DeadLetters(context_of(request).queue).ids(MAX_AT_ONCE))
    return await _retry(request, ids)


@router.delete(
    "/dead/{job_id}",
    responses=_ONE | {200: answer("Forgotten", PURGED)},
    summary="Forget a dead job",
)
async def purge_dead(request: Request, job_id: str) -> Purged:
    """Its record goes too."""
    await _dead(request, job_id)
    return await _purge(request, [job_id])


@router.delete(
    "/dead",
    responses=_ANY | {200: answer("Forgotten", PURGED)},
    summary="Forget all dead jobs",
)
async def purge_all_dead(request: Request) -> Purged:
    """Up to a hundred at once; `remaining` tells whether to ask again."""
    ids = await promptly(DeadLetters(context_of(request).queue).ids(MAX_AT_ONCE))
    return await _purge(request, ids)


@router.get(
    "/pools",
    responses=_ANY | {200: answer("All pools", [POOL])},
    summary="What is served, waits and runs",
)
async def pools(request: Request) -> list[PoolDetail]:
    """Every pool with its model, queue and live workers."""
    queue = context_of(request).queue
    states = []
    for name in await promptly(queue.pools()):
        info = await promptly(queue.model_info(name))
        states.append(
            PoolDetail(
                name=name,
                model=info.name if info else None,
                model_hash=info.hash if info else None,
                queued=await promptly(queue.depth(name)),
                workers=await _workers(request, name),
            )
        )
    return states


@router.get(
    "/workers",
    responses=_ANY | {200: answer("All workers", [WORKER])},
    summary="Who works",
)
async def workers(request: Request) -> list[WorkerState]:
    """The live workers of every pool."""
    names = await promptly(context_of(request).queue.pools())
    return [worker for name in names for worker in await _workers(request, name)]


async def _workers(request: Request, pool: str) -> list[WorkerState]:
    found = await promptly(context_of(request).queue.workers(pool))
    return [
        WorkerState(
            id=worker.id, pool=worker.pool, running=worker.running, beat_at=rfc3339(worker.beat_ms)
        )
        for worker in found
    ]


async def _dead(request: Request, job_id: str) -> JobRecord:
    """The record of a dead job; raises NotFound for any other."""
    dead = DeadLetters(context_of(request).queue)
    record = await promptly(dead.record(job_id)) if is_job_id(job_id) else None
    if record is None:
        raise NotFound(f"there is no dead job '{printable(job_id)}'")
    return record


async def _retry(request: Request, job_ids: list[str]) -> Retried:
    dead = DeadLetters(context_of(request).queue)
    fresh = {job_id: await promptly(dead.retry(job_id)) for job_id in job_ids}
    done = {old: new for old, new in fresh.items() if new is not None}
    return Retried(retried=done, remaining=await promptly(dead.count()))


async def _purge(request: Request, job_ids: list[str]) -> Purged:
    dead = DeadLetters(context_of(request).queue)
    purged = await promptly(dead.purge(*job_ids))
    return Purged(purged=purged, remaining=await promptly(dead.count()))


def _fields(record: JobRecord) -> dict[str, Any]:
    error = record.error
    return {
        "id": record.id,
        "tenant": record.tenant,
        "pool": record.pool,
        "priority": record.priority,
        "attempts": record.attempts,
        "submitted_at": rfc3339(record.submitted_ms),
        "finished_at": rfc3339(record.finished_ms) if record.finished_ms else None,
        "error": ErrorAnswer(code=error.code, detail=error.detail) if error else None,
    }
