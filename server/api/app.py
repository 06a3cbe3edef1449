"""The FastAPI application: routes, error handlers, and what lives as long as the process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from server import metrics
from server.api import admin, events, generate, health, internal, jobs, openai, state, usage
from server.api.auth import authenticate
from server.api.context import ApiContext
from server.api.image_links import ImageLinks
from server.api.middleware import RequestGuard, WholeAnswers, note_route
from server.api.openapi import describe
from server.api.page import add_pages
from server.api.problems import HANDLERS
from server.api.rates import Rates
from server.api.webhook_targets import WebhookGuard
from server.api.webhooks import WebhookCourier
from server.config import Settings
from server.protocol import DEFAULT_POOL
from server.queue.api_keys import KeyRing
from server.queue.blobs import BlobStore
from server.queue.connection import SCRIPT_NAMES, end_tasks
from server.queue.jobs import JobQueue, open_queue
from server.queue.upkeep import Upkeep

ROUTERS = (
    generate.router, jobs.listing, jobs.router, events.router, openai.router, health.router,
    health.probes, usage.router, state.router, admin.router,
)  # fmt: skip


def create_app(
    settings: Settings,
    queue: JobQueue | None = None,
    blobs: BlobStore | None = None,
    *,
    loopback_only: bool = False,
    keys_required: bool = False,
    needs_worker: bool = False,
) -> FastAPI:
    """Build the application.

    Args:
        settings: see `server.config`.
        queue: a queue to use; by default one is opened and closed with the application.
        blobs: a blob store to use instead of the one of `settings`.
        loopback_only: refuse requests whose Host header is no loopback name.
        keys_required: refuse requests without an API key; otherwise keys are ignored.
        needs_worker: `/readyz` waits for a live worker with a loaded model, not for Redis alone.
    """
    metrics.declare(SCRIPT_NAMES)
    metrics.declare_pool(DEFAULT_POOL)
    used = queue or open_queue(settings)
    context = ApiContext(
        settings=settings,
        queue=used,
        blobs=blobs or BlobStore(settings.blob_store_url),
        needs_worker=needs_worker,
        keys_required=keys_required,
        loopback_only=loopback_only,
        key_ring=KeyRing(used),
        rates=Rates(used),
        image_links=ImageLinks(used, signed=keys_required),
        webhook_guard=WebhookGuard(settings.webhook_networks),
    )
    bearer = [Depends(HTTPBearer(auto_error=False))] if keys_required else []
    app = FastAPI(
        title="Lumina",
        description="Text to image with the Lumina-Image 2.0 family.",
        lifespan=_lifespan(context, owns_queue=queue is None),
        exception_handlers=HANDLERS,
        dependencies=[Depends(note_route), Depends(authenticate), *bearer],
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own page is loaded from other servers
        redoc_url=None,
    )
    describe(app, ROUTERS)
    app.state.context = context
    app.add_middleware(WholeAnswers)
    app.add_middleware(RequestGuard, loopback_only=loopback_only)
    for router in ROUTERS:
        app.include_router(router)
    if metrics.shared_folder():  # of `lumina serve`, whose processes have one `/metrics`
        app.include_router(internal.exposition)
    add_pages(app)
    return app


def _lifespan(
    context: ApiContext, *, owns_queue: bool
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        upkeep = asyncio.create_task(Upkeep(context.queue, context.blobs).run())
        courier = WebhookCourier(
            context.queue,
            context.webhook_guard,
            context.image_links,
            context.settings.webhook_secret,
        )
        webhooks = asyncio.create_task(courier.run())
        try:
            yield
        finally:
            await end_tasks(upkeep, webhooks)
            if owns_queue:
                await context.queue.close()

    return lifespan
