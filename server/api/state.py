"""`GET /state`: what the service is doing, for whoever waits: pools, their workers and queues."""

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.context import ApiContext, context_of, promptly
from server.api.openapi import QUEUE, answer, problems

router = APIRouter()


class PoolState(BaseModel):
    """One pool: the model its workers serve, and what waits for them."""

    pool: str
    model: str
    hash: str
    workers: int = Field(description="live workers that take work")
    running: int = Field(description="jobs that these workers hold")
    queued: int = Field(description="jobs that wait")
    queue_limit: int = Field(description="at so many waiting jobs, more are refused")
    work_s: float | None = Field(
        description="estimated seconds until what waits now is done; null without a worker"
    )


class StateAnswer(BaseModel):
    """What `GET /state` says; every number is of this moment."""

    pools: list[PoolState]


EXAMPLE = {
    "pools": [
        {
            "pool": "default", "model": "demo", "hash": "1f1e97a6718ad9f1" + 48 * "0", "workers": 2,
            "running": 5, "queued": 3, "queue_limit": 1000, "work_s": 4.2,
        }
    ]
}  # fmt: skip


@router.get(
    "/state",
    response_model=StateAnswer,
    responses=problems(*QUEUE) | {200: answer("At this moment", EXAMPLE)},
    summary="Pools, workers and queues",
)
async def state(request: Request) -> Response:
    """Live workers, running and waiting jobs of every pool, and how long the waiting take."""
    found = await promptly(_state(context_of(request)))
    return JSONResponse(found.model_dump(), headers={"Cache-Control": "no-store"})


async def _state(context: ApiContext) -> StateAnswer:
    queue = context.queue
    pools = []
    for pool in await queue.pools():
        info = await queue.model_info(pool)
        if info is None:
            continue
        workers = await queue.workers(pool)
        work_s = await queue.queued_work_ms(pool) / 1000
        pools.append(
            PoolState(
                pool=pool,
                model=info.name,
                hash=info.hash,
                workers=len(workers),
                running=sum(worker.running for worker in workers),
                queued=await queue.depth(pool),
                queue_limit=queue.queue_limit,
                work_s=round(work_s / len(workers), 3) if workers else None,
            )
        )
    return StateAnswer(pools=pools)
