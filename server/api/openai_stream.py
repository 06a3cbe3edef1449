"""The stream of `POST /v1/images/generations`: unfinished pictures, then the finished ones.

The partial pictures are true ones, decoded by the worker in the middle of denoising. Workers store
them as JPEG; here they become what the caller asked for.
"""

import asyncio
import base64
import contextlib
import io
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import anyio
import structlog
from PIL import Image
from sse_starlette.event import ServerSentEvent

from server.api.context import ApiContext, promptly
from server.api.events import sse, until_stopped
from server.api.generate import cancel_quietly
from server.api.jobs import read_image
from server.api.openai_errors import error_object
from server.api.openai_schemas import token_usage
from server.api.problems import job_failure
from server.errors import NotFound, ServerError
from server.protocol import JobRecord, OutputFormat
from server.queue.events import JobEvent, NewPicture

PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
ERROR = "error"
PARTIAL_FORMAT: OutputFormat = "jpeg"

log = structlog.get_logger(__name__)


class ImageStream:
    """The events of one job.

    Args:
        context: of this process.
        record: the job, queued.
        abandon: cancel it when the reader leaves or the wait is over.
    """

    def __init__(self, context: ApiContext, record: JobRecord, *, abandon: bool) -> None:
        self._context = context
        self._record = record
        self._abandon = abandon
        self._told: dict[int, int] = defaultdict(int)  # partial pictures sent of each picture
        self._ended = False

    async def events(self) -> AsyncGenerator[ServerSentEvent, None]:
        """Yield them up to the last picture, or one error."""
        try:
            async with contextlib.aclosing(self._pictures()) as pictures:
                async for event in pictures:
                    yield event
        except ServerError as error:
            log.warning("stream broke off", job=self._record.id, reason=error.detail)
            yield _error(error.status, error.code, "the stream broke off; try again")
        finally:
            if self._abandon and not self._ended:
                with anyio.CancelScope(shield=True):
                    await cancel_quietly(self._context, self._record.id)

    async def _pictures(self) -> AsyncGenerator[ServerSentEvent, None]:
        limit_s = self._context.settings.sync_timeout
        looking = self._context.queue.look_on(self._record.id)
        async with contextlib.aclosing(until_stopped(self._context, looking, limit_s)) as events:
            async for seen in events:
                if isinstance(seen, NewPicture) and seen.image is not None:
                    assert seen.number is not None
                    for event in await self._partials(seen.image, seen.number + 1):
                        yield event
                if isinstance(seen, JobEvent) and seen.last:
                    self._ended = True
        if not self._ended:
            why = "stops" if self._context.stopping.is_set() else f"waits {limit_s:g} s at most"
            yield _error(504, "timeout", f"the picture is not done yet, and the service {why}")
            return
        # A message about one may be lost with a connection; the pictures are there.
        for image in range(self._record.spec.num_images):
            for event in await self._partials(image, self._record.spec.partial_images):
                yield event
        async for event in self._end():
            yield event

    async def _partials(self, image: int, upto: int) -> list[ServerSentEvent]:
        """Partial pictures of a picture that were not sent yet, in their order."""
        events = []
        for number in range(self._told[image], upto):
            picture = await promptly(self._context.queue.partial(self._record.id, image, number))
            if picture is None:
                break
            self._told[image] = number + 1
            output_format = self._record.spec.output_format
            data, size = await asyncio.to_thread(_converted, picture, output_format)
            fields = {"partial_image_index": number, **self._common(data, size, image)}
            events.append(_event(PARTIAL, fields))
        return events

    async def _end(self) -> AsyncGenerator[ServerSentEvent, None]:
        record = await promptly(self._context.queue.get(self._record.id))
        if record is None or record.result is None:
            yield _error(*job_failure(record or self._record))
            return
        if not record.result.images:
            raise NotFound(f"job {record.id} was erased")
        for index, image in enumerate(record.result.images):
            data = await read_image(self._context, record, index)
            fields = self._common(data, f"{image.width}x{image.height}", index)
            usage = token_usage(record.result.prompt_tokens, [image])
            fields |= {"usage": usage.model_dump(), "seed": image.seed}
            yield _event(COMPLETED, fields)

    def _common(self, data: bytes, size: str, image: int) -> dict[str, Any]:
        return {
            "b64_json": base64.b64encode(data).decode(),
            "created_at": self._record.submitted_ms // 1000,
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._record.spec.output_format,
            "image_index": image,
        }


def _converted(picture: bytes, output_format: OutputFormat) -> tuple[bytes, str]:
    """A stored partial picture in another format, and its size."""
    with Image.open(io.BytesIO(picture)) as opened:
        size = f"{opened.width}x{opened.height}"
        if output_format == PARTIAL_FORMAT:
            return picture, size
        buffer = io.BytesIO()
        options = {"compress_level": 1} if output_format == "png" else {"quality": 90}
        opened.save(buffer, output_format, **options)
    return buffer.getvalue(), size


def _event(kind: str, fields: dict[str, Any]) -> ServerSentEvent:
    return sse(kind, {"type": kind, **fields})


def _error(status: int, code: str, detail: str) -> ServerSentEvent:
    return sse(ERROR, {"type": ERROR, **error_object(status, code, detail)[1]})
