"""The port for the operator's machines: probes, metrics, and the signal for autoscaling."""

import asyncio
import contextlib
from collections.abc import Iterator

import structlog
import uvicorn
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server import metrics
from server.api import health
from server.api.context import ApiContext, context_of, promptly
from server.api.openapi import QUEUE, answer, problems
from server.api.problems import HANDLERS
from server.errors import InvalidRequest, QueueUnavailable
from server.protocol import DEFAULT_POOL, is_name

log = structlog.get_logger(__name__)
router = APIRouter()
exposition = APIRouter()  # of `lumina serve` on its main port, too


class Scale(BaseModel):
    """How much work a pool has. `work_seconds` is the estimated device time of the queued jobs and
    of what is left of the running ones: what an autoscaler divides among workers."""

    pool: str
    queued: int
    running: int
    work_seconds: float
    workers: int


@exposition.get(
    "/metrics",
    response_class=Response,
    responses=problems(*QUEUE)
    | {200: answer("Text for Prometheus", "lumina_webhook_outbox 0.0\n", "text/plain")},
    summary="Prometheus metrics",
)
async def metrics_page(request: Request) -> Response:
    """Every series of `docs/operations.md`; those of the queue are looked up now."""
    with contextlib.suppress(
        QueueUnavailable
    ):  # counted; the other series must be told all the same
        await promptly(tell_load(context_of(request)))
    body = await asyncio.to_thread(metrics.exposition)
    return Response(body, media_type=metrics.MEDIA_TYPE)


@router.get("/internal/scale", response_model=Scale, summary="Work of a pool, for autoscaling")
async def scale(request: Request, pool: str = DEFAULT_POOL) -> Scale:
    """Queued and running work of a pool."""
    if not is_name(pool):
        raise InvalidRequest("pool must be 1 to 64 letters, digits, dots and dashes")
    queue = context_of(request).queue
    loads = (await promptly(queue.load(pool))).values()
    return Scale(
        pool=pool,
        queued=sum(load.queued for load in loads),
        running=sum(load.running for load in loads),
        work_seconds=round(sum(load.work_s + load.running_work_s for load in loads), 3),
        workers=len(await promptly(queue.workers(pool))),
    )


async def tell_load(context: ApiContext) -> None:
    """Set every gauge of the queue; raises QueueUnavailable."""
    queue = context.queue
    dead = await queue.dead_by_pool()
    for pool in sorted({DEFAULT_POOL, *await queue.pools()}):
        metrics.declare_pool(pool)
        for priority, load in (await queue.load(pool)).items():
            metrics.queue_depth.labels(pool, priority).set(load.queued)
            metrics.queue_oldest_age.labels(pool, priority).set(load.oldest_s)
            metrics.queue_work.labels(pool, priority).set(load.work_s)
            metrics.jobs_running.labels(pool, priority).set(load.running)
        metrics.queue_depth_limit.labels(pool).set(queue.queue_limit)
        metrics.workers_live.labels(pool).set(len(await queue.workers(pool)))
        metrics.dead_jobs.labels(pool).set(dead.get(pool, 0))
    state = await queue.redis_state()
    metrics.redis_persistence_ok.set(state.persistence_ok)
    metrics.redis_memory_ratio.set(state.memory_ratio)
    metrics.webhook_outbox.set(state.outbox)
    metrics.epoch_ok.set(not queue.data_lost)


def create_internal_app(context: ApiContext) -> FastAPI:
    """The application of the internal port; it shares the context of the public one."""
    app = FastAPI(
        title="Lumina, internal",
        exception_handlers=HANDLERS,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.context = context
    app.include_router(router)
    app.include_router(exposition)
    app.include_router(health.probes)
    return app


class InternalServer(uvicorn.Server):
    """Serves the internal application until its task is cancelled; leaves signals alone."""

    def __init__(self, context: ApiContext) -> None:
        super().__init__(
            uvicorn.Config(
                create_internal_app(context), log_config=None, access_log=False,
                server_header=False, lifespan="off",
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The public server listens to them."""
        yield
