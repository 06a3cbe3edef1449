"""The FastAPI application: routes, error handlers, and what lives as long as the process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from server.api import events, generate, health, jobs, openai, state
from server.api.context import ApiContext
from server.api.middleware import RequestGuard
from server.api.openapi import describe
from server.api.page import add_page
from server.api.problems import HANDLERS
from server.config import Settings
from server.queue.blobs import BlobStore
from server.queue.connection import end_tasks
from server.queue.jobs import JobQueue, open_queue
from server.queue.upkeep import Upkeep

ROUTERS = (
    generate.router, jobs.listing, jobs.router, events.router, openai.router, health.router,
    state.router,
)  # fmt: skip


def create_app(
    settings: Settings,
    queue: JobQueue | None = None,
    blobs: BlobStore | None = None,
    *,
    loopback_only: bool = False,
    needs_worker: bool = False,
) -> FastAPI:
    """Build the application.

    Args:
        settings: see `server.config`.
        queue: a queue to use; by default one is opened and closed with the application.
        blobs: a blob store to use instead of the one of `settings`.
        loopback_only: refuse requests whose Host header is no loopback name.
        needs_worker: `/readyz` waits for a live worker with a loaded model, not for Redis alone.
    """
    context = ApiContext(
        settings=settings,
        queue=queue or open_queue(settings),
        blobs=blobs or BlobStore(settings.blob_store_url),
        needs_worker=needs_worker,
    )
    app = FastAPI(
        title="Lumina",
        description="Text to image with the Lumina-Image 2.0 family.",
        lifespan=_lifespan(context, owns_queue=queue is None),
        exception_handlers=HANDLERS,
        redirect_slashes=False,
        redoc_url=None,
    )
    describe(app, ROUTERS)
    app.state.context = context
    app.add_middleware(RequestGuard, loopback_only=loopback_only)
    for router in ROUTERS:
        app.include_router(router)
    add_page(app)
    return app


def _lifespan(
    context: ApiContext, *, owns_queue: bool
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        upkeep = asyncio.create_task(Upkeep(context.queue, context.blobs).run())
        try:
            yield
        finally:
            await end_tasks(upkeep)
            if owns_queue:
                await context.queue.close()

    return lifespan
