"""`lumina generate --url`: a picture from a server, with its progress. Loads no torch."""

from typing import TYPE_CHECKING, Any

from server.errors import ServiceError
from server.progress import progress_bar

if TYPE_CHECKING:
    from server.client_types import Event, Job
    from server.progress import Bar

MISSING = "lumina generate --url needs the extra `client`: pip install '.[client]'"


class RefusedInput(ValueError):
    """The server says that the request is wrong: another try does not help."""


def draw_remotely(
    url: str, api_key: str | None, prompt: str, fields: dict[str, Any]
) -> "tuple[bytes, Job]":
    """Have a server draw a picture and return its file, and the job.

    Leaving before its end (Ctrl-C) cancels the job.

    Raises:
        RefusedInput: the server refuses the request.
        ServiceError: anything else that keeps the picture from coming, in one sentence.
        ValueError: `url` is no address of a server, or `api_key` no key.
    """
    try:
        from server.client import Client, InvalidInput, LuminaError, NotAllowed
    except ImportError:
        raise ServiceError(MISSING) from None
    try:
        with Client(url, api_key=api_key) as client:
            with progress_bar() as bar:
                job = client.generate(prompt, on_event=lambda event: _show(bar, event), **fields)
            data = client.fetch(job.images[0])
    except InvalidInput as error:
        raise RefusedInput(error.detail) from None
    except LuminaError as error:
        unknown = isinstance(error, NotAllowed) and error.status == 401
        hint = " (--api-key or LUMINA_API_KEY)" if unknown else ""
        raise ServiceError(f"{url}: {error}{hint}") from None
    return data, job


def summary(job: "Job") -> str:
    """What was drawn, in a few words."""
    image, steps, timings = job.images[0], job.steps, job.timings
    words = [f"{image.width}x{image.height}", f"seed {image.seed}", f"model {job.model}"]
    if steps is not None:
        words.append(f"{steps.computed + steps.skipped} steps")
    if timings is not None:
        words.append(f"{timings.total_s:.1f} s")
    return ", ".join((*words, f"job {job.id}"))


def _show(bar: "Bar", event: "Event") -> None:
    if event.type == "queued":
        bar.reach("waiting")
    elif event.type in ("started", "progress"):
        bar.reach("drawing", event.step, event.total)
