"""`/jobs`: what became of jobs, their pictures, and their end by the caller's wish."""

import asyncio
import time
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.answers import JobAnswer, job_answer
from server.api.auth import Caller, caller
from server.api.context import ApiContext, context_of, promptly
from server.api.examples import CANCELED, SUCCEEDED
from server.api.openapi import QUEUE, Responses, answer, problems
from server.api.schemas import printable
from server.errors import NotFound
from server.protocol import (
    MEDIA_TYPES,
    ImageRef,
    JobRecord,
    JobStatus,
    is_job_id,
)
from server.queue.erasure import erase

PAGE = 20
MAX_PAGE = 100
LIST_S = 4.0  # a page of a long list takes many questions
ERASE_S = 10.0  # removing pictures may reach another server

router = APIRouter(prefix="/jobs/{job_id}")
listing = APIRouter()


async def find_job(context: ApiContext, who: Caller, job_id: str) -> JobRecord:
    """Return the caller's job; raises NotFound for any other."""
    record = await promptly(context.queue.get(job_id)) if is_job_id(job_id) else None
    if record is None or not who.sees(record):
        raise _no_job(job_id)
    return record


def _no_job(job_id: str) -> NotFound:
    return NotFound(f"there is no job '{printable(job_id)}'")


_MISSING = problems("not-found", *QUEUE)
_ENDED: Responses = {200: answer("The job as it is now", CANCELED)}


@router.get(
    "",
    response_model=JobAnswer,
    responses=_MISSING | {200: answer("The job as it is now", SUCCEEDED)},
    summary="What became of a job",
)
async def get_job(request: Request, job_id: str) -> Response:
    """Status, queue position, step i of n, timings and pictures of a job."""
    context = context_of(request)
    record = await find_job(context, caller(request), job_id)
    headers = {"Cache-Control": "no-store"}
    return JSONResponse(job_answer(record, context.image_links).model_dump(), headers=headers)


@router.get(
    "/images/{index}",
    response_class=Response,
    responses=problems("not-found", "storage-unavailable", *QUEUE)
    | {
        200: {
            "description": "The picture",
            "content": {
                media: {"schema": {"type": "string", "format": "binary"}}
                for media in MEDIA_TYPES.values()
            },
        },
        304: {"description": "You have it already: If-None-Match names its ETag"},
    },
    summary="A picture of a job",
)
async def get_image(request: Request, job_id: str, index: str) -> Response:
    """The bytes of one picture; its ETag is their sha256."""
    context = context_of(request)
    record = await find_job(context, caller(request), job_id)
    image = _image(record, index)
    wanted = request.headers.get("if-none-match", "")
    tags = {tag.strip().removeprefix("W/") for tag in wanted.split(",")}
    if tags & {"*", f'"{image.sha256}"'}:
        return Response(status_code=304, headers=_image_headers(record, image))
    return await image_response(context, record, int(index))


def _image(record: JobRecord, index: str) -> ImageRef:
    images = record.result.images if record.result else ()
    if index.isascii() and index.isdigit() and len(index) <= 4 and int(index) < len(images):
        return images[int(index)]
    raise NotFound(
        f"job {record.id} has {len(images)} images and is {record.status}: "
        f"there is no image '{printable(index)}'"
    )


def _image_headers(record: JobRecord, image: ImageRef) -> dict[str, str]:
    # A job's picture never changes, so a cache may keep it for as long as the server does.
    lifetime_s = max(0, (record.expires_ms or 0) // 1000 - int(time.time()))
    extension = "jpg" if image.format == "jpeg" else image.format
    return {
        "ETag": f'"{image.sha256}"',
        "Cache-Control": f"private, max-age={lifetime_s}, immutable",
        "Content-Disposition": f'inline; filename="lumina-{image.seed}.{extension}"',
        "X-Content-Type-Options": "nosniff",
        "X-Job-Id": record.id,
        "X-Seed": str(image.seed),
    }


async def read_image(context: ApiContext, record: JobRecord, index: int) -> bytes:
    """Read one picture of a job from the blob store. Raises NotFound if there is none (now)."""
    image = _image(record, str(index))
    try:
        return await asyncio.to_thread(context.blobs.get, image.path, image.sha256)
    except NotFound:
        raise NotFound(f"image {index} of job {record.id} is no longer stored") from None


async def image_response(context: ApiContext, record: JobRecord, index: int) -> Response:
    """Answer with one picture of a job; raises as `read_image`."""
    image = _image(record, str(index))
    data = await read_image(context, record, index)
    headers = _image_headers(record, image)
    return Response(data, media_type=MEDIA_TYPES[image.format], headers=headers)


@router.post(
    "/cancel", response_model=JobAnswer, responses=_MISSING | _ENDED, summary="Cancel a job"
)
async def cancel_job(request: Request, job_id: str) -> Response:
    """Cancel a job: a queued one at once, a running one at its next step. Safe to repeat."""
    context = context_of(request)
    await find_job(context, caller(request), job_id)
    record = await promptly(context.queue.cancel(job_id))
    if record is None:
        raise _no_job(job_id)
    return JSONResponse(job_answer(record, context.image_links).model_dump())


@router.delete(
    "",
    response_model=JobAnswer,
    responses=problems("not-found", "storage-unavailable", *QUEUE) | _ENDED,
    summary="Erase a job",
)
async def delete_job(request: Request, job_id: str) -> Response:
    """Cancel a job that has not ended, and erase its prompt and pictures. Safe to repeat.

    What is left tells how it ended, for as long as any job is kept.
    """
    context = context_of(request)
    await find_job(context, caller(request), job_id)
    record = await promptly(erase(context.queue, context.blobs, job_id), ERASE_S)
    if record is None:
        raise _no_job(job_id)
    return JSONResponse(job_answer(record, context.image_links).model_dump())


class JobList(BaseModel):
    """Some of the caller's jobs, the newest first."""

    jobs: list[JobAnswer]


@listing.get(
    "/jobs",
    response_model=JobList,
    responses=problems("invalid-request", *QUEUE)
    | {200: answer("Your jobs, the newest first", {"jobs": [SUCCEEDED]})},
    summary="Your jobs",
)
async def list_jobs(
    request: Request,
    status: Annotated[JobStatus | None, Query(description="only jobs of this status")] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_PAGE, description=f"at most so many, up to {MAX_PAGE}")
    ] = PAGE,
    cursor: Annotated[
        str | None,
        Query(pattern=r"^[0-9]{1,15}$", description="from the `Link` of the page before"),
    ] = None,
) -> Response:
    """The caller's own jobs, the newest first. A header `Link: <...>; rel="next"` continues."""
    context = context_of(request)
    reading = context.queue.list_jobs(
        caller(request).tenant, status=status, limit=limit, cursor=cursor
    )
    page = await promptly(reading, LIST_S)
    headers = {"Cache-Control": "no-store"}
    if page.cursor is not None:
        query = {"status": status, "limit": limit, "cursor": page.cursor}
        given = {name: value for name, value in query.items() if value is not None}
        headers["Link"] = f'</jobs?{urlencode(given)}>; rel="next"'
    jobs = [job_answer(record, context.image_links).model_dump() for record in page.records]
    return JSONResponse({"jobs": jobs}, headers=headers)
