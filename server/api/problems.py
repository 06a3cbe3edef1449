"""Every error the API answers: RFC 9457 problem details with a stable `type` and `code`."""

import math
import random
from collections.abc import Iterator
from typing import Any

import structlog
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Scope

from server import metrics
from server.api.openai_errors import is_openai, openai_error
from server.api.schemas import InvalidFields, printable, shown
from server.errors import QueueUnavailable, ServerError
from server.protocol import JobRecord

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:lumina:problem:"

TITLES = {
    "malformed-body": "The body is not JSON",
    "unauthorized": "An API key is needed",
    "foreign-host": "The host name is not served",
    "foreign-origin": "Pages of other sites may not use this service",
    "missing-scope": "The API key may not do this",
    "not-found": "Not found",
    "method-not-allowed": "The method is not allowed",
    "body-timeout": "The body did not arrive in time",
    "body-too-large": "The body is too large",
    "not-json": "The content type is not JSON",
    "invalid-request": "The request is not valid",
    "unknown-model": "The model is not served",
    "job-canceled": "The job was canceled",
    "job-expired": "The job missed its deadline",
    "job-failed": "The job failed",
    "too-many-jobs": "Too many of your jobs are open",
    "quota-exceeded": "Your jobs of today are used up",
    "rate-limited": "Too many requests",
    "deadline-too-short": "The deadline cannot be met",
    "idempotency-mismatch": "The idempotency key was used with another body",
    "data-lost": "The queue has lost data",
    "out-of-memory": "The job needs more memory than is free",
    "queue-full": "The queue is full",
    "queue-unavailable": "The queue is unavailable",
    "storage-unavailable": "The picture store is unavailable",
    "model-not-ready": "No model is loaded yet",
    "service-error": "The service is broken",
    "timeout": "The picture took longer than a caller may wait",
    "internal": "Internal error",
    "http-error": "The request cannot be served",
}


def _tree(base: type[ServerError]) -> Iterator[type[ServerError]]:
    yield base
    for below in base.__subclasses__():
        yield from _tree(below)


# The status of every code, outside OpenAI's paths; `http-error` keeps whatever it had.
STATUSES: dict[str, int] = {error.code: error.status for error in _tree(ServerError)} | {
    "method-not-allowed": 405,
    "job-canceled": 409,
    "job-failed": 500,
    "out-of-memory": 503,
    "job-expired": 504,
    "timeout": 504,
}

LONGEST_RETRY_S = 120
QUEUE_AWAY = "the job queue does not answer; try again in a few seconds"

# What a query parameter must be, by pydantic's name of what is wrong.
_RULES = {
    "int_parsing": " must be a whole number",
    "greater_than_equal": " must be at least {ge}",
    "less_than_equal": " must be at most {le}",
    "literal_error": " must be {expected}",
    "string_pattern_mismatch": " must be one of an earlier answer",
}

_HTTP_CODES = {404: "not-found", 405: "method-not-allowed"}

log = structlog.get_logger(__name__)


class FieldProblem(BaseModel):
    """One wrong field of a body."""

    field: str
    detail: str


class Problem(BaseModel):
    """The answer of every 4xx and 5xx, as `application/problem+json`."""

    type: str
    title: str
    status: int
    detail: str = Field(description="one sentence")
    code: str = Field(description="stable, for programs")
    request_id: str | None = None
    job: str | None = Field(None, description="the job that this is about")
    errors: list[FieldProblem] | None = None


class ProblemResponse(JSONResponse):
    """A Problem on the wire."""

    media_type = MEDIA_TYPE


def request_id_of(scope: Scope) -> str | None:
    """The id that the middleware gave this request."""
    value = scope.get("state", {}).get("request_id")
    return value if isinstance(value, str) else None


def retry_after(estimate_s: float | None) -> int:
    """A jittered Retry-After in seconds, so that refused callers do not come back together; never
    sooner than estimated, for then they would be refused again.
    """
    jittered = random.uniform(1.0, 1.5) * (estimate_s if estimate_s is not None else 2.5)
    return min(max(math.ceil(jittered), 1), LONGEST_RETRY_S)


def problem(
    scope: Scope,
    status: int,
    code: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    job: str | None = None,
    errors: list[FieldProblem] | None = None,
    retry_s: float | None = None,
) -> JSONResponse:
    """Build the response of one problem; a 429 or 503 always says when to come back.

    OpenAI's paths get OpenAI's error object instead.
    """
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", str(retry_after(retry_s)))
    if status == 401:
        headers.setdefault("WWW-Authenticate", 'Bearer realm="lumina"')
    if is_openai(scope["path"]):
        return openai_error(status, code, detail, [error.field for error in errors or ()], headers)
    body = Problem(
        type=TYPE_PREFIX + code,
        title=TITLES[code],
        status=status,
        detail=detail,
        code=code,
        request_id=request_id_of(scope),
        job=job,
        errors=errors,
    )
    return ProblemResponse(body.model_dump(exclude_none=True), status_code=status, headers=headers)


def job_failure(record: JobRecord) -> tuple[int, str, str]:
    """Why a job that was waited for ended without a picture: status, code, sentence."""
    detail = record.error.detail if record.error else "The job ended without a picture."
    if record.status == "canceled":
        return 409, "job-canceled", "The job was canceled."
    if record.status == "expired":
        return 504, "job-expired", detail
    if record.error and record.error.code == "out-of-memory":
        return 503, "out-of-memory", detail
    return 500, "job-failed", detail


def job_problem(scope: Scope, record: JobRecord) -> JSONResponse:
    """The answer to a caller who waited for a job that ended without a picture."""
    assert record.finished
    assert record.status != "succeeded"
    headers = {"Location": f"/jobs/{record.id}"}
    return problem(scope, *job_failure(record), headers=headers, job=record.id)


def error_problem(
    scope: Scope,
    error: ServerError,
    *,
    headers: dict[str, str] | None = None,
    job: str | None = None,
) -> JSONResponse:
    """The response of one error of our own tree."""
    detail = error.detail
    if isinstance(error, QueueUnavailable):  # its detail tells operators where Redis is
        log.warning("queue unavailable", reason=detail)
        detail = QUEUE_AWAY
    errors = None
    if isinstance(error, InvalidFields):
        errors = [FieldProblem(field=field, detail=detail) for field, detail in error.fields]
    return problem(
        scope, error.status, error.code, detail,
        headers=headers, job=job, errors=errors, retry_s=error.retry_after_s,
    )  # fmt: skip


async def on_server_error(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of our own tree."""
    assert isinstance(error, ServerError)
    if request.method == "POST" and error.code in metrics.REJECTIONS:
        metrics.jobs_rejected.labels(error.code).inc()
    return error_problem(request.scope, error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer what the router refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = printable(request.url.path)
    details: dict[int, str] = {
        404: f"There is nothing at {path}.",
        405: f"{request.method} is not allowed at {path}.",
    }
    status = error.status_code
    code = _HTTP_CODES.get(status, "http-error")
    detail = details.get(status, str(error.detail))
    return problem(request.scope, status, code, detail, headers=dict(error.headers or {}))


async def on_invalid_parameters(request: Request, error: Exception) -> JSONResponse:
    """Answer wrong query parameters and headers."""
    assert isinstance(error, RequestValidationError)
    fields = []
    for item in error.errors():
        name = str(item["loc"][-1])
        rule = _RULES.get(item["type"], ": {msg}").format(msg=item["msg"], **item.get("ctx", {}))
        sentence = f"{name}{rule}, got {shown(item.get('input'))}"
        fields.append((name, sentence))
    return error_problem(request.scope, InvalidFields(fields))


HANDLERS: dict[Any, Any] = {
    ServerError: on_server_error,
    HTTPException: on_http_exception,
    RequestValidationError: on_invalid_parameters,
}
