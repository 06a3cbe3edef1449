"""Probes, and what the served model offers."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.admission import find_model
from server.api.context import ApiContext, context_of, promptly
from server.api.examples import OFFER
from server.api.openapi import QUEUE, answer, problems
from server.api.schemas import MAX_IMAGES
from server.errors import DataLost, ModelNotReady, QueueUnavailable
from server.protocol import ModelInfo

router = APIRouter()
probes = APIRouter()


class Health(BaseModel):
    """How this process is."""

    status: str


class Limits(BaseModel):
    """What the checkpoint allows; sizes in pixels."""

    min_size: int
    max_size: int
    size_multiple: int
    max_steps: int
    max_images: int
    max_prompt_tokens: int


class Offer(BaseModel):
    """What `GET /presets` says about the model a request gets without naming one."""

    model: str
    hash: str
    limits: Limits
    defaults: dict[str, object]
    presets: dict[str, dict[str, object]]
    templates: list[str]
    loras: list[str]


@probes.get(
    "/livez",
    response_model=Health,
    responses=problems() | {200: answer("Alive", {"status": "alive"})},
    summary="The process answers",
)
async def livez() -> Response:
    """Alive; never touches Redis."""
    return JSONResponse({"status": "alive"})


@probes.get(
    "/startupz",
    response_model=Health,
    responses=problems() | {200: answer("Started", {"status": "started"})},
    summary="The process has started",
)
async def startupz() -> Response:
    """Started; never touches Redis."""
    return JSONResponse({"status": "started"})


@probes.get(
    "/readyz",
    response_model=Health,
    responses=problems("data-lost", "model-not-ready", "queue-unavailable")
    | {200: answer("Ready", {"status": "ready"})},
    summary="Requests are welcome",
)
async def readyz(request: Request) -> Response:
    """Ready when Redis answers and, in `lumina serve`, a live worker has loaded its model."""
    context = context_of(request)
    if context.stopping.is_set():
        raise QueueUnavailable("the service is stopping")
    await promptly(context.queue.ping())
    if context.queue.data_lost:
        why = context.queue.data_lost
        raise DataLost(f"Redis has lost data ({why}); `lumina epoch accept` goes on without")
    if context.needs_worker:
        await promptly(_require_worker(context))
    return JSONResponse({"status": "ready"})


async def _require_worker(context: ApiContext) -> None:
    pool, _ = await find_model(context, None)
    if not await context.queue.workers(pool):
        raise ModelNotReady("no worker is alive")


@router.get(
    "/presets",
    response_model=Offer,
    responses=problems("model-not-ready", *QUEUE) | {200: answer("The offer", OFFER)},
    summary="What the model offers",
)
async def presets(request: Request) -> Offer:
    """Limits, defaults, presets, prompt templates and LoRAs of the default model."""
    _, info = await promptly(find_model(context_of(request), None))
    return offer_of(info)


def offer_of(info: ModelInfo) -> Offer:
    """The public face of what a worker has published."""
    defaults = {
        "width": info.default_width,
        "height": info.default_height,
        "num_inference_steps": info.default_steps,
        **info.defaults,
    }
    return Offer(
        model=info.name,
        hash=info.hash,
        limits=Limits(
            min_size=info.min_size,
            max_size=info.max_size,
            size_multiple=info.size_multiple,
            max_steps=info.max_steps,
            max_images=MAX_IMAGES,
            max_prompt_tokens=info.max_prompt_tokens,
        ),
        defaults=defaults,
        presets=info.presets,
        templates=list(info.templates),
        loras=list(info.loras),
    )
