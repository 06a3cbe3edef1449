"""What the routes share: settings, queue, blob store, and the bound on every answer of Redis."""

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request

from server.config import Settings
from server.errors import QueueUnavailable
from server.queue.blobs import BlobStore
from server.queue.connection import end_tasks, last_answer
from server.queue.jobs import JobQueue

REDIS_ANSWER_S = 0.8  # the API promises a 503 within a second when Redis is away
BUSY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class ApiContext:
    """One per API process. `stopping` is set when the process has been told to end."""

    settings: Settings
    queue: JobQueue
    blobs: BlobStore
    needs_worker: bool
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def context_of(request: Request) -> ApiContext:
    """The context of the application that serves `request`."""
    context = request.app.state.context
    assert isinstance(context, ApiContext)
    return context


async def promptly(answer: Awaitable[T], extra_s: float = 0.0) -> T:
    """Await something that only Redis can delay; raises QueueUnavailable after REDIS_ANSWER_S.

    `extra_s` is for what must reach a disk or another server first. As long as Redis answers others
    it is not away, and this process just busy: then there is more time, up to BUSY_S.
    """
    limit_s = REDIS_ANSWER_S + extra_s
    task = asyncio.ensure_future(answer)
    began = time.monotonic()
    left_s = limit_s
    try:
        while left_s > 0:
            await asyncio.wait((task,), timeout=left_s)
            if task.done():
                return task.result()
            waited_s = time.monotonic() - began
            left_s = min(limit_s - last_answer.age_s, BUSY_S + extra_s - waited_s)
        raise QueueUnavailable(f"Redis did not answer within {waited_s:.1f} s")
    finally:
        if not task.done():
            await end_tasks(task)
