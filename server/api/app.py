"""The FastAPI application: routes, error handlers, and what lives as long as the process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from server import metrics
from server.api import generate, health, internal, jobs
from server.api.context import ApiContext
from server.api.middleware import RequestGuard
from server.api.problems import HANDLERS
from server.config import Settings
from server.protocol import DEFAULT_POOL
from server.queue.blobs import BlobStore
from server.queue.connection import SCRIPT_NAMES, end_tasks
from server.queue.jobs import JobQueue, open_queue
from server.queue.upkeep import Upkeep

UI_FOLDER = Path(__file__).parent / "ui"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


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
    metrics.declare(SCRIPT_NAMES)
    metrics.declare_pool(DEFAULT_POOL)
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
    app.state.context = context
    app.add_middleware(RequestGuard, loopback_only=loopback_only)
    for router in (generate.router, jobs.router, health.router, health.probes):
        app.include_router(router)
    if metrics.shared_folder():  # of `lumina serve`, whose processes have one `/metrics`
        app.include_router(internal.router)
    app.add_api_route("/", _page, include_in_schema=False)
    app.mount("/ui", StaticFiles(directory=UI_FOLDER))
    return app


async def _page() -> FileResponse:
    return FileResponse(UI_FOLDER / "index.html", headers=PAGE_HEADERS)


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
