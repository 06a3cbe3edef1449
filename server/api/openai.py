"""`/v1`: the OpenAI images API in front of the same jobs; its official clients work unchanged."""

import asyncio
import base64
from typing import Any
from urllib.parse import urljoin

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.admission import offers
from server.api.answers import job_answer
from server.api.auth import caller
from server.api.context import ApiContext, context_of, promptly
from server.api.events import EventStreamResponse
from server.api.examples import IMAGE_EVENT, IMAGES, IMAGES_BODIES, MODEL
from server.api.generate import cancel_quietly, submit, wait_for
from server.api.jobs import read_image
from server.api.middleware import CLIENT_CLOSED
from server.api.negotiation import read_idempotency, read_json
from server.api.openai_schemas import (
    ImageData,
    ImagesAnswer,
    ImagesBody,
    ModelAnswer,
    ModelList,
    native_body,
    token_usage,
)
from server.api.openai_stream import COMPLETED, ERROR, PARTIAL, ImageStream
from server.api.openapi import (
    BODY,
    QUEUE,
    SUBMIT,
    answer,
    event_stream,
    json_body,
    openai_problems,
    schema_of,
)
from server.api.problems import job_problem, problem
from server.api.schemas import parse_body, printable
from server.errors import NotFound, UnknownModel
from server.protocol import JobRecord

TOO_LONG = "the picture was not done within {:g} s, the longest a caller may wait"
STOPS = "the service stops; try again in a few seconds"

router = APIRouter(prefix="/v1")


_OFFERS = openai_problems("model-not-ready", *QUEUE)


@router.get(
    "/models",
    responses=_OFFERS | {200: answer("All models", {"object": "list", "data": [MODEL]})},
    summary="Served models, as OpenAI lists them",
)
async def list_models(request: Request) -> ModelList:
    """All models that workers serve now."""
    served = await promptly(offers(context_of(request)))
    return ModelList(data=[ModelAnswer(id=info.name) for _, info in served])


@router.get(
    "/models/{model}",
    responses=openai_problems("unknown-model", "model-not-ready", *QUEUE)
    | {200: answer("The model", MODEL)},
    summary="A served model, as OpenAI describes it",
)
async def get_model(request: Request, model: str) -> ModelAnswer:
    """One model that workers serve now."""
    served = [info.name for _, info in await promptly(offers(context_of(request)))]
    if model not in served:
        raise UnknownModel(f"there is no model '{printable(model)}'; {', '.join(served)} is served")
    return ModelAnswer(id=model)


_DRAWN = {
    "description": "The finished pictures; with `stream`, server-sent events",
    "content": {
        "application/json": {"schema": schema_of(ImagesAnswer), "example": IMAGES},
        **event_stream((PARTIAL, COMPLETED, ERROR), IMAGE_EVENT),
    },
}


@router.post(
    "/images/generations",
    response_class=Response,
    responses=openai_problems(*BODY, *SUBMIT, "timeout", *QUEUE) | {200: _DRAWN},
    summary="Draw pictures, as OpenAI does",
    openapi_extra=json_body(ImagesBody, IMAGES_BODIES),
)
async def create_images(request: Request) -> Response:
    """Draw what the body asks for; with `stream`, unfinished pictures are sent on the way."""
    context = context_of(request)
    asked = parse_body(ImagesBody, await read_json(request))
    body = native_body(asked)
    idempotency = read_idempotency(request, "images", asked.model_dump())
    partial_images = (asked.partial_images or 0) if asked.stream else 0
    output_format = asked.output_format or "png"
    record = await submit(
        context, caller(request), body, output_format, idempotency, partial_images
    )
    abandon = idempotency is None
    if asked.stream:
        return EventStreamResponse(ImageStream(context, record, abandon=abandon).events())
    limit_s = context.settings.sync_timeout
    waited = await wait_for(request, context, record.id, limit_s, abandon=abandon)
    if waited is None:
        return Response(status_code=CLIENT_CLOSED)
    if not waited.finished:
        if abandon:
            await cancel_quietly(context, record.id)
        if context.stopping.is_set():  # unlike a timeout, this passes: clients try again
            return problem(request.scope, 503, "queue-unavailable", STOPS, job=record.id)
        return problem(request.scope, 504, "timeout", TOO_LONG.format(limit_s), job=record.id)
    if waited.status != "succeeded":
        return job_problem(request.scope, waited)
    return JSONResponse(await _answer(request, context, waited, asked))


async def _answer(
    request: Request, context: ApiContext, record: JobRecord, asked: ImagesBody
) -> dict[str, Any]:
    assert record.result is not None
    images = list(record.result.images)
    if not images:
        raise NotFound(f"job {record.id} was erased")
    links = job_answer(record, context.image_links).images
    data = []
    for index, image in enumerate(images):
        if asked.response_format == "url":
            url = urljoin(str(request.base_url), links[index].url)
            data.append(ImageData(url=url, seed=image.seed))
        else:
            drawn = await read_image(context, record, index)
            text = await asyncio.to_thread(base64.b64encode, drawn)
            data.append(ImageData(b64_json=text.decode(), seed=image.seed))
    return ImagesAnswer(
        created=(record.finished_ms or 0) // 1000,
        output_format=record.spec.output_format,
        size=f"{images[0].width}x{images[0].height}",
        data=data,
        usage=token_usage(record.result.prompt_tokens, images),
    ).model_dump(exclude_none=True)
