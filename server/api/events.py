"""`GET /jobs/{id}/events`: what happens to a job, as server-sent events.

The data of every event are fields of the job, as JSON; those of the last are the whole job. Each
reader reads the job's own stream at its own pace, so nothing is buffered for it here: one that
takes nothing for SLOW_READER_S is let go, and may resume where it was by `Last-Event-ID`.
"""

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import anyio
import structlog
from fastapi import APIRouter, Header
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.answers import job_answer
from server.api.auth import caller
from server.api.context import ApiContext, context_of, promptly
from server.api.examples import EVENT
from server.api.jobs import find_job
from server.api.openapi import QUEUE, event_stream, problems
from server.errors import NotFound, QueueUnavailable
from server.protocol import JobRecord
from server.queue.connection import end_tasks
from server.queue.events import FROM_THE_START, JobEvent, NewPicture

HEARTBEAT_S = 15
SLOW_READER_S = 20.0
LOOK_S = 20.0  # how often we say that somebody looks; it holds for a minute
RETRY_MS = (1000, 3000)  # readers of a service that stops do not all come back at once
EVENT_NAMES = (
    "queued", "started", "progress", "preview", "succeeded", "failed", "canceled", "expired",
)  # fmt: skip
PREVIEW_MEDIA_TYPE = "image/jpeg"

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/jobs/{job_id}")


class EventStreamResponse(EventSourceResponse):
    """Server-sent events with a comment every HEARTBEAT_S; a reader too slow for them is let go.

    Args:
        events: the events.
        slow_reader_s: how long sending one may take.
    """

    def __init__(
        self, events: AsyncIterator[ServerSentEvent], slow_reader_s: float = SLOW_READER_S
    ) -> None:
        super().__init__(
            events,
            ping=HEARTBEAT_S,
            ping_message_factory=lambda: ServerSentEvent(comment="still here", sep="\n"),
            send_timeout=slow_reader_s,
            sep="\n",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the reader is gone or too slow."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("slow reader let go", path=scope["path"])
            raise ClientDisconnect from None


def sse(event: str, data: Any, event_id: str | None = None) -> ServerSentEvent:
    """One event whose data are JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return ServerSentEvent(text, event=event, id=event_id, sep="\n")


def goodbye(why: str) -> ServerSentEvent:
    """The end of a stream whose story goes on: when to come back."""
    return ServerSentEvent(comment=why, retry=random.randint(*RETRY_MS), sep="\n")


@router.get(
    "/events",
    response_class=Response,
    responses=problems("not-found", "invalid-request", *QUEUE)
    | {
        200: {
            "description": "Server-sent events",
            "content": event_stream(EVENT_NAMES, EVENT),
        },
        204: {"description": "The job has ended, and you have its last event"},
    },
    summary="Follow a job",
)
async def get_events(
    request: Request,
    job_id: str,
    last_event_id: Annotated[
        str | None, Header(description="the id of the last event you have; what follows is sent")
    ] = None,
) -> Response:
    """Events `queued`, `started`, `progress`, `preview`, then the job's end.

    Their data are fields of the job. `preview` has the latest unfinished picture and is not
    repeated. After the end of a job there is nothing to follow: 204, which ends an EventSource.
    """
    context = context_of(request)
    record = await find_job(context, caller(request), job_id)
    after = last_event_id or FROM_THE_START
    await promptly(context.queue.events(job_id, after))  # refuses what is no event id
    if record.finished and await anext(context.queue.follow(job_id, after), None) is None:
        return Response(status_code=204)
    return EventStreamResponse(_tell(context, record, after))


async def _tell(
    context: ApiContext, record: JobRecord, after: str
) -> AsyncGenerator[ServerSentEvent, None]:
    """The events of a job from `after` on, up to its end or this service's."""
    looking = asyncio.create_task(keep_looking(context, record.id))
    events = until_stopped(context, context.queue.look_on(record.id, after))
    try:
        async with contextlib.aclosing(events):
            if not record.finished:
                event = await _preview_event(context, record.id)
                if event is not None:
                    yield event
            async for seen in events:
                if isinstance(seen, NewPicture):
                    event = await _preview_event(context, record.id) if seen.image is None else None
                elif seen is not None:
                    event = await _job_event(context, record.id, seen)
                else:
                    continue
                if event is not None:
                    yield event
                if isinstance(seen, JobEvent) and seen.last:
                    return
        if context.stopping.is_set():
            yield goodbye("the service stops; come back for the rest")
    except QueueUnavailable as error:
        log.warning("queue away", doing="events", job=record.id, reason=error.detail)
        yield goodbye("the job queue does not answer; come back for the rest")
    except NotFound:  # the job has expired meanwhile
        return
    finally:
        with anyio.CancelScope(shield=True):  # the reader may have left
            await end_tasks(looking)


async def _job_event(context: ApiContext, job_id: str, event: JobEvent) -> ServerSentEvent:
    if event.last:
        record = await promptly(context.queue.get(job_id))
        whole = (
            job_answer(record, context.image_links).model_dump()
            if record
            else {"id": job_id, "status": event.type}
        )
        return sse(event.type, whole, event.id)
    status = "queued" if event.type == "queued" else "running"
    numbers = {name: int(value) for name, value in event.fields.items()}
    return sse(event.type, {"id": job_id, "status": status, **numbers}, event.id)


async def _preview_event(context: ApiContext, job_id: str) -> ServerSentEvent | None:
    picture = await promptly(context.queue.preview(job_id))
    if picture is None:
        return None
    data = base64.b64encode(picture).decode()
    return sse("preview", {"id": job_id, "media_type": PREVIEW_MEDIA_TYPE, "b64_json": data})


async def keep_looking(context: ApiContext, job_id: str) -> None:
    """Say for as long as this runs that somebody looks at the job's previews."""
    while True:
        # Previews are the first thing that a Redis short of memory refuses.
        with contextlib.suppress(QueueUnavailable):
            await context.queue.watch(job_id)
        await asyncio.sleep(LOOK_S)


async def until_stopped(
    context: ApiContext, events: AsyncGenerator[Any, None], limit_s: float | None = None
) -> AsyncGenerator[Any, None]:
    """Pass `events` on until they end, the process is told to, or `limit_s` is over."""
    stopping = asyncio.create_task(context.stopping.wait())
    deadline = None if limit_s is None else time.monotonic() + limit_s
    upcoming: asyncio.Task[Any] | None = None
    try:
        while not context.stopping.is_set():
            upcoming = asyncio.ensure_future(anext(events, _END))
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            await asyncio.wait(
                (upcoming, stopping), timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not upcoming.done() or upcoming.result() is _END:
                return
            yield upcoming.result()
    finally:
        with anyio.CancelScope(shield=True):
            await end_tasks(stopping, *([upcoming] if upcoming else []))
            await events.aclose()


_END = object()
