"""What the routes share: settings, queue, blob store, and the bound on every answer of Redis."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from server.api.image_links import ImageLinks
from server.api.rates import Rates
from server.api.webhook_targets import WebhookGuard
from server.config import Settings
from server.errors import QueueUnavailable
from server.queue.api_keys import KeyRing
from server.queue.blobs import BlobStore
from server.queue.connection import end_tasks, last_answer
from server.queue.jobs import JobQueue

REDIS_ANSWER_S = 0.8  # the API promises a 503 within a second when Redis is away
BUSY_S = 10.0
TURN_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class ApiContext:
    """One per API process. `stopping` is set when the process has been told to end.

    `keys_required` and `loopback_only` say who may call (`server.api.auth`).
    """

    settings: Settings
    queue: JobQueue
    blobs: BlobStore
    needs_worker: bool
    keys_required: bool
    loopback_only: bool
    key_ring: KeyRing
    rates: Rates
    image_links: ImageLinks
    webhook_guard: WebhookGuard
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def context_of(request: Request) -> ApiContext:
    """The context of the application that serves `request`."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


async def promptly(answer: Awaitable[T], extra_s: float = 0.0) -> T:
    """Await something that only Redis can delay; raises QueueUnavailable after REDIS_ANSWER_S.

    `extra_s` is for what must reach a disk or another server first. As long as Redis answers others
    it is not away, and this process just busy: then there is more time, up to BUSY_S. Nor does it
    count when this process itself stands still.
    """
    task = asyncio.ensure_future(answer)
    started = turn = time.monotonic()
    silent_s = 0.0
    try:
        while silent_s < REDIS_ANSWER_S + extra_s and turn - started < BUSY_S + extra_s:
            await asyncio.wait((task,), timeout=TURN_S)
            if task.done():
                return task.result()
            took_s = time.monotonic() - turn
            turn += took_s
            silent_s = 0.0 if last_answer.age_s < took_s else silent_s + min(took_s, 2 * TURN_S)
        raise QueueUnavailable(f"Redis did not answer within {turn - started:.1f} s")
    finally:
        if not task.done():
            await end_tasks(task)
