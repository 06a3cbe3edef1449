"""What the OpenAPI document says beyond what FastAPI finds out: problems, examples, statuses.

Every endpoint names the codes it may answer with; the statuses, their sentences and their examples
come from the table of `server.api.problems`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.openai_errors import OpenAIError, error_object
from server.api.openai_schemas import ImagesAnswer, ImagesBody
from server.api.problems import MEDIA_TYPE, STATUSES, TITLES, TYPE_PREFIX, Problem
from server.api.schemas import GenerateBody

Responses = dict[int | str, dict[str, Any]]

# What any endpoint may answer, any that needs a key where keys are on, and any that asks Redis.
ANYWHERE = ("foreign-host", "foreign-origin", "internal")
KEYS = ("unauthorized", "missing-scope", "rate-limited")
QUEUE = ("queue-unavailable", *KEYS)
BODY = ("malformed-body", "body-timeout", "body-too-large", "not-json", "invalid-request")
SUBMIT = (
    "unknown-model", "idempotency-mismatch", "too-many-jobs", "quota-exceeded", "queue-full",
    "deadline-too-short", "data-lost", "model-not-ready", "job-failed", "job-canceled",
    "job-expired", "out-of-memory", "storage-unavailable", "not-found",
)  # fmt: skip

_REF = "#/components/schemas/{model}"
_MODELS: tuple[type[BaseModel], ...] = (
    Problem, OpenAIError, GenerateBody, ImagesBody, ImagesAnswer,
)  # fmt: skip


def schema_of(model: type[BaseModel]) -> dict[str, str]:
    """A reference to a model that the document defines."""
    return {"$ref": _REF.format(model=model.__name__)}


def json_body(model: type[BaseModel], examples: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` for a route that reads its body itself; `examples` by their titles."""
    named = {title: {"summary": title, "value": value} for title, value in examples.items()}
    content = {"application/json": {"schema": schema_of(model), "examples": named}}
    return {"requestBody": {"required": True, "content": content}}


def header(name: str, description: str, example: str) -> dict[str, Any]:
    """An optional request header."""
    return {
        "in": "header", "name": name, "required": False, "description": description,
        "schema": {"type": "string"}, "example": example,
    }  # fmt: skip


def problems(*codes: str) -> Responses:
    """The responses for these problems and those that come anywhere, by status."""
    found: Responses = {}
    for status, named in _by_status((*codes, *ANYWHERE)).items():
        examples = {code: {"value": _problem_example(status, code)} for code in named}
        content = {MEDIA_TYPE: {"schema": schema_of(Problem), "examples": examples}}
        found[status] = {"description": _titles(named), "content": content}
    return found


def openai_problems(*codes: str) -> Responses:
    """As `problems`, for the paths that speak OpenAI's language."""
    by_status: dict[int, list[str]] = defaultdict(list)
    for code in dict.fromkeys((*codes, *ANYWHERE)):
        by_status[error_object(STATUSES[code], code, "")[0]].append(code)
    found: Responses = {}
    for status, named in sorted(by_status.items()):
        examples = {
            code: {"value": error_object(STATUSES[code], code, f"{TITLES[code]}.")[1]}
            for code in named
        }
        content = {"application/json": {"schema": schema_of(OpenAIError), "examples": examples}}
        found[status] = {"description": _titles(named), "content": content}
    return found


def answer(description: str, example: Any, media_type: str = "application/json") -> dict[str, Any]:
    """A response with an example; its schema comes from the route's model."""
    return {"description": description, "content": {media_type: {"example": example}}}


def event_stream(names: Sequence[str], example: dict[str, Any]) -> dict[str, Any]:
    """The content of a response that is a stream of such events, each with JSON as its data."""
    text = {"type": "string"}
    fields = {
        "id": text,
        "event": {"type": "string", "enum": list(names)},
        "data": {"type": "string", "contentMediaType": "application/json"},
        "retry": {"type": "integer"},
    }
    schema = {"type": "object", "properties": fields}
    return {"text/event-stream": {"schema": schema, "example": example}}


def describe(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Let the application's document be what is said here; its endpoints are those of `routers`."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, routers)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, routers: Iterable[APIRouter]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    _restore_examples(routers, document)
    schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
    ours = models_json_schema([(m, "validation") for m in _MODELS], ref_template=_REF)[1]
    schemas |= ours["$defs"]
    for operations in document["paths"].values():
        for operation in operations.values():
            # FastAPI's own error of invalid parameters is never answered: problems are.
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return document


def _restore_examples(routers: Iterable[APIRouter], document: dict[str, Any]) -> None:
    """Put examples in as they are: FastAPI leaves out what is null in them."""
    for route in (route for router in routers for route in router.routes):
        assert isinstance(route, APIRoute)
        for method in route.methods or ():
            responses = document["paths"][route.path_format][method.lower()]["responses"]
            for status, response in route.responses.items():
                for media, content in response.get("content", {}).items():
                    given = {k: v for k, v in content.items() if k in ("example", "examples")}
                    responses[str(status)]["content"][media].update(given)


def _by_status(codes: Iterable[str]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = defaultdict(list)
    for code in dict.fromkeys(codes):
        found[STATUSES[code]].append(code)
    return dict(sorted(found.items()))


def _titles(codes: list[str]) -> str:
    return "; ".join(TITLES[code] for code in codes)


def _problem_example(status: int, code: str) -> dict[str, Any]:
    title = TITLES[code]
    return {
        "type": TYPE_PREFIX + code, "title": title, "status": status, "detail": f"{title}.",
        "code": code,
    }  # fmt: skip
