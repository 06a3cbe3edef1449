"""`POST /generate`: check, admit, enqueue; then wait for the picture or answer 202."""

import asyncio
import secrets

import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.admission import find_model, price
from server.api.answers import JobAnswer, job_answer
from server.api.auth import Caller, caller
from server.api.context import ApiContext, context_of, promptly
from server.api.examples import BODIES, QUEUED, SUCCEEDED
from server.api.jobs import image_response
from server.api.middleware import CLIENT_CLOSED
from server.api.negotiation import read_idempotency, read_json, read_prefer, wanted_format
from server.api.openapi import BODY, QUEUE, SUBMIT, answer, header, json_body, problems
from server.api.problems import error_problem, job_problem
from server.api.schemas import (
    MAX_SEED,
    GenerateBody,
    InvalidFields,
    check_against_model,
    job_spec,
    parse_generate,
    printable,
)
from server.api.webhook_targets import ForbiddenTarget
from server.errors import QueueUnavailable, ServerError
from server.protocol import MEDIA_TYPES, JobRecord, OutputFormat, new_job_id
from server.queue.connection import end_tasks
from server.queue.jobs import Idempotency, Webhook

log = structlog.get_logger(__name__)
router = APIRouter()

_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_RESPONSES = problems(*BODY, *SUBMIT, *QUEUE) | {
    200: {
        "model": JobAnswer,
        "description": "The finished job, or its single picture where Accept asks for one",
        "content": {"application/json": {"example": SUCCEEDED}}
        | dict.fromkeys(MEDIA_TYPES.values(), _IMAGE),
    },
    202: {"model": JobAnswer, **answer("Accepted; follow Location", QUEUED)},
}
_HEADERS = [
    header("Prefer", "respond-async: 202 at once; wait=N: 202 after N seconds", "wait=10"),
    header(
        "Idempotency-Key",
        "up to 255 printable characters; the same request again gets the first one's job",
        "order-5",
    ),
]


@router.post(
    "/generate",
    responses=_RESPONSES,
    summary="Draw a picture",
    openapi_extra=json_body(GenerateBody, BODIES) | {"parameters": _HEADERS},
)
async def generate(request: Request) -> Response:
    """Draw what the body asks for; waits for the picture unless `Prefer` says otherwise."""
    context = context_of(request)
    preference = read_prefer(request, context.settings.sync_timeout)
    accepted_format = wanted_format(request)
    body = parse_generate(await read_json(request))
    output_format = _output_format(body, accepted_format)
    idempotency = read_idempotency(request, body.model_dump(), output_format)
    record = await submit(context, caller(request), body, output_format, idempotency)
    if preference.wait_s > 0:
        try:
            waited = await wait_for(
                request, context, record.id, preference.wait_s, abandon=idempotency is None
            )
        except ServerError as error:  # the job lives on; tell the caller where
            headers = {"Location": f"/jobs/{record.id}"}
            return error_problem(request.scope, error, headers=headers, job=record.id)
        if waited is None:
            return Response(status_code=CLIENT_CLOSED)
        record = waited
    if not record.finished:
        return _accepted(context, record, preference.applied)
    if record.status != "succeeded":
        return job_problem(request.scope, record)
    if accepted_format is not None:
        return await image_response(context, record, 0)
    return JSONResponse(job_answer(record, context.image_links).model_dump())


def _output_format(body: GenerateBody, accepted: OutputFormat | None) -> OutputFormat:
    """The format to store: the body's, else what Accept asks for, else png."""
    if accepted is None:
        return body.output_format or "png"
    if (body.num_images or 1) != 1:
        sentence = f"num_images must be 1 where Accept asks for an image, got {body.num_images}"
        raise InvalidFields([("num_images", sentence)])
    if body.output_format not in (None, accepted):
        sentence = (
            f"output_format must agree with the Accept header ('{accepted}'), "
            f'got "{body.output_format}"'
        )
        raise InvalidFields([("output_format", sentence)])
    return accepted


async def submit(
    context: ApiContext,
    who: Caller,
    body: GenerateBody,
    output_format: OutputFormat,
    idempotency: Idempotency | None,
    partial_images: int = 0,
) -> JobRecord:
    """Check a body against its model, price it and queue it; an absent seed is drawn here."""
    pool, info = await promptly(find_model(context, body.model))
    check_against_model(body, info)
    cost_ms = price(body, info)
    webhook = await _webhook(context, who, body)
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    spec = job_spec(body, seed=seed, output_format=output_format, partial_images=partial_images)
    submission = context.queue.submit(
        new_job_id(),
        spec,
        tenant=who.tenant,
        pool=pool,
        priority=body.priority or "normal",
        cost_ms=cost_ms,
        deadline_s=body.deadline_s,
        idempotency=idempotency,
        limits=who.limits,
        webhook=webhook,
    )
    return await promptly(submission, context.queue.confirm_s)


async def _webhook(context: ApiContext, who: Caller, body: GenerateBody) -> Webhook | None:
    """What is told of the job's end; raises InvalidFields for a URL that must not be called."""
    if body.webhook_url is None:
        return None
    try:
        await context.webhook_guard.check(body.webhook_url)
    except ForbiddenTarget as error:
        sentence = f"webhook_url {error}, got '{printable(body.webhook_url)}'"
        raise InvalidFields([("webhook_url", sentence)]) from None
    return Webhook(body.webhook_url, who.key_hash)


async def wait_for(
    request: Request, context: ApiContext, job_id: str, wait_s: float, *, abandon: bool
) -> JobRecord | None:
    """Return the job when it has ended, time is up or the service stops.

    None when the client leaves meanwhile; with `abandon` that cancels the job.
    """
    finished = asyncio.create_task(context.queue.wait(job_id, wait_s))
    left = asyncio.create_task(_disconnected(request))
    stopping = asyncio.create_task(context.stopping.wait())
    try:
        await asyncio.wait((finished, left, stopping), return_when=asyncio.FIRST_COMPLETED)
        if finished.done():
            return finished.result()
        if left.done():
            if abandon:
                await cancel_quietly(context, job_id)
            return None
        record = await promptly(context.queue.get(job_id))
        if record is None:
            raise QueueUnavailable(f"job {job_id} is gone from the queue")
        return record
    finally:
        await end_tasks(finished, left, stopping)


async def _disconnected(request: Request) -> None:
    """Return once the client has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def cancel_quietly(context: ApiContext, job_id: str) -> None:
    """Cancel the job of a client that has left: nobody hears whether it worked."""
    try:
        await promptly(context.queue.cancel(job_id))
        log.info("client left; job canceled", job=job_id)
    except ServerError as error:
        log.warning("client left; job could not be canceled", job=job_id, reason=error.detail)


def _accepted(context: ApiContext, record: JobRecord, applied: str | None) -> Response:
    headers = {"Location": f"/jobs/{record.id}", "Retry-After": "1"}
    if applied:
        headers["Preference-Applied"] = applied
    return JSONResponse(
        job_answer(record, context.image_links).model_dump(), status_code=202, headers=headers
    )
