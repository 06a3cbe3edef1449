"""Errors as the OpenAI API words them: what its clients turn into their own exceptions."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

PREFIX = "/v1/"

# Codes that its clients know; ours otherwise, with underscores.
_CODES = {
    "unknown-model": "model_not_found",
    "unauthorized": "invalid_api_key",
    "too-many-jobs": "rate_limit_exceeded",
    "rate-limited": "rate_limit_exceeded",
    "quota-exceeded": "insufficient_quota",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

# Our names of fields in its words.
_PARAMS = {
    "width": "size",
    "height": "size",
    "num_images": "n",
    "quality": "output_compression",
}

# The same request would fail again: its clients repeat any 409, 429 and 5xx unless they are told.
_HOPELESS = frozenset({"job-failed", "job-canceled", "job-expired", "timeout", "quota-exceeded"})


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIError(BaseModel):
    """The error object of the OpenAI API."""

    error: ErrorDetail


def is_openai(path: str) -> bool:
    """Whether a path belongs to the OpenAI-compatible part."""
    return path.startswith(PREFIX)


def error_object(
    status: int, code: str, detail: str, fields: Sequence[str] = ()
) -> tuple[int, dict[str, Any]]:
    """Return OpenAI's status and error object of a problem; `fields` are those at fault."""
    if code == "unknown-model":
        status = 404
    elif status == 422:
        status = 400
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    param = _PARAMS.get(fields[0], fields[0]) if fields else None
    if code == "unknown-model":
        param = "model"
    named = _CODES.get(code, code.replace("-", "_"))
    error = ErrorDetail(message=detail, type=kind, param=param, code=named)
    return status, OpenAIError(error=error).model_dump()


def openai_error(
    status: int, code: str, detail: str, fields: Sequence[str], headers: dict[str, str]
) -> JSONResponse:
    """The response of a problem under OpenAI's paths."""
    status, body = error_object(status, code, detail, fields)
    if code in _HOPELESS:
        headers = {**headers, "x-should-retry": "false"}
    return JSONResponse(body, status_code=status, headers=headers)
