"""Refuses at the door what the service cannot serve: unknown models and too much work at once."""

from server.api.context import ApiContext
from server.api.schemas import GenerateBody, InvalidFields, printable, resolved, resolved_sigmas
from server.errors import ModelNotReady, UnknownModel
from server.protocol import DEFAULT_POOL, ModelInfo

# Eight 1024 px pictures of 100 steps; one job beyond it would hold a device for many minutes.
MAX_PIXEL_STEPS = 8 * 1024 * 1024 * 100


async def offers(context: ApiContext) -> list[tuple[str, ModelInfo]]:
    """Return every pool and what it serves, the default first; raises ModelNotReady if nobody does.

    Workers publish what they serve once their model is loaded.
    """
    pools = sorted(await context.queue.pools(), key=lambda pool: (pool != DEFAULT_POOL, pool))
    infos = [(pool, await context.queue.model_info(pool)) for pool in pools]
    found = [(pool, info) for pool, info in infos if info is not None]
    if not found:
        raise ModelNotReady("no worker has loaded a model yet; try again in a few seconds")
    return found


async def find_model(context: ApiContext, name: str | None) -> tuple[str, ModelInfo]:
    """Return the pool that serves the model called `name` (None: the default) and its offer.

    Raises ModelNotReady while no worker has published anything, UnknownModel for another name.
    """
    served = await offers(context)
    for pool, info in served:
        if name is None or name in (info.name, pool):
            return pool, info
    names = ", ".join(info.name for _, info in served)
    asked = printable(name or "")
    raise UnknownModel(f"model must be one that is served ({names}), got '{asked}'")


def _number(body: GenerateBody, info: ModelInfo, field: str, default: int) -> int:
    value = resolved(body, info, field)
    return default if value is None else int(value)


def evaluations(body: GenerateBody, info: ModelInfo) -> int:
    """How many denoising steps a checked body comes to: times the network is asked per picture."""
    sampler = resolved(body, info, "sampler")
    sigmas = resolved_sigmas(body, info)
    intervals = _number(body, info, "num_inference_steps", info.default_steps)
    if sigmas is not None:
        intervals = len(sigmas)
    elif sampler != "dpm" and resolved(body, info, "time_grid") == "official":
        intervals -= 1  # the official grid counts points
    return 2 * intervals if sampler == "midpoint" else intervals


def price(body: GenerateBody, info: ModelInfo) -> int:
    """The estimated device time of a checked body in milliseconds, at least 1.

    Raises InvalidFields when pixels x images x steps exceed MAX_PIXEL_STEPS.
    """
    width = _number(body, info, "width", info.default_width)
    height = _number(body, info, "height", info.default_height)
    steps = evaluations(body, info)
    num_images = body.num_images or 1
    pixel_steps = width * height * steps * num_images
    if pixel_steps > MAX_PIXEL_STEPS:
        sentence = (
            f"width x height x num_images x evaluations of the network must be at most "
            f"{MAX_PIXEL_STEPS}, got {width} x {height} x {num_images} x {steps} = {pixel_steps}"
        )
        raise InvalidFields([("num_images", sentence)])
    default_pixels = info.default_width * info.default_height
    growing_ms = info.step_cost_ms - info.step_fixed_ms
    return max(1, round(info.step_fixed_ms * steps + growing_ms * pixel_steps / default_pixels))
