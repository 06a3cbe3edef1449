"""A typed client of the HTTP API, synchronous and asynchronous.

    from server.client import Client

    with Client("http://127.0.0.1:8000") as client:
        job = client.generate("a red circle above a blue square", seed=1)
        client.picture(job.images[0]).save("a.png")

Needs httpx (the extra `client`) and no torch. Requests that fail on their way, and those that the
server refuses for the moment, are repeated; a submission carries an `Idempotency-Key`, so that a
repeated one is the same job. Errors are those of `server.client_types`.
"""

import asyncio
import contextlib
import io
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from typing import Any, Self, TypeVar, Unpack

import httpx
from PIL import Image

from server.client_types import (
    ApiError,
    DamagedImage,
    Event,
    GenerateFields,
    InvalidInput,
    Job,
    JobCanceled,
    JobExpired,
    JobFailed,
    JobImage,
    LuminaError,
    Missing,
    NotAllowed,
    NotReachable,
    ServerTrouble,
    Status,
    TooManyRequests,
    WaitTimeout,
    failure_of,
)
from server.client_wire import EventFeed, Flow, Pause, Wire, http_options

__all__ = [
    "ApiError", "AsyncClient", "Client", "DamagedImage", "Event", "InvalidInput", "Job",
    "JobCanceled", "JobExpired", "JobFailed", "JobImage", "LuminaError", "Missing", "NotAllowed",
    "NotReachable", "ServerTrouble", "TooManyRequests", "WaitTimeout",
]  # fmt: skip

DEFAULT_URL = "http://127.0.0.1:8000"

T = TypeVar("T")


class Client:
    """Talks to one server. Safe to use from several threads.

    Args:
        base_url: of the server.
        api_key: where the server wants one.
        timeout_s: how long connecting, and each silence within an answer, may last.
        max_retries: how often a request is repeated.
        reconnect_s: how long `watch` tries to reach a server that does not answer.
        transport: of httpx, to reach the server in another way.

    Raises:
        ValueError: `base_url` is no address of a server, or `api_key` no key.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 4,
        reconnect_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        options = http_options(base_url, api_key, timeout_s)
        self._http = httpx.Client(transport=transport, **options)
        self._wire = Wire(self._http, max_retries)
        self._reconnect_s = reconnect_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def generate(
        self,
        prompt: str,
        *,
        wait_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Job:
        """Draw and wait: returns the job that succeeded, raises JobFailed for one that did not.

        Whoever gives up (WaitTimeout after `wait_s`, an exception of `on_event`, Ctrl-C) cancels
        the job, unless it has an `idempotency_key` by which others may know it.
        """
        job = self.submit(prompt, idempotency_key=idempotency_key, **fields)
        try:
            job = self.wait(job.id, timeout_s=wait_s, on_event=on_event)
        except BaseException:
            if idempotency_key is None:
                self._cancel_quietly(job.id)
            raise
        if job.status != "succeeded":
            raise failure_of(job)
        return job

    def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[GenerateFields]
    ) -> Job:
        """Queue a job and return it at once."""
        return self._drive(self._wire.submit(prompt, fields, idempotency_key))

    def job(self, job_id: str) -> Job:
        """What became of a job."""
        return self._drive(self._wire.job(job_id))

    def jobs(self, status: Status | None = None, limit: int = 20) -> Iterator[Job]:
        """Your jobs, the newest first, as many as are read; fetched `limit` at a time."""
        page = self._drive(self._wire.page("/jobs", status=status, limit=limit))
        yield from page.jobs
        while page.next is not None:
            page = self._drive(self._wire.page(page.next))
            yield from page.jobs

    def watch(
        self, job_id: str, *, after: str | None = None, timeout_s: float | None = None
    ) -> Generator[Event, None, None]:
        """The events of a job behind `after`, as they happen, up to its end.

        A connection that breaks is taken up where it was. Raises WaitTimeout after `timeout_s`
        (which is noticed at the latest 15 s later), NotReachable when the server stays away.
        """
        feed = EventFeed(self._http, job_id, after, timeout_s, self._reconnect_s)
        while not feed.over():
            try:
                response = self._http.send(feed.request(), stream=True)
                with contextlib.closing(response):
                    if feed.opened(response):
                        for text in response.iter_text():
                            yield from feed.take(text)
                            if feed.over():
                                return
                        feed.lost()
                    else:
                        response.read()
                        feed.refused(response)
            except httpx.RequestError as error:
                feed.lost(error)
            if not feed.over():
                time.sleep(feed.pause_s)

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Job:
        """The job once it has ended, however; `on_event` hears what happens meanwhile."""
        last = None
        with contextlib.closing(self.watch(job_id, timeout_s=timeout_s)) as events:
            for last in events:
                if on_event is not None:
                    on_event(last)
        return (last.job if last is not None else None) or self.job(job_id)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job; one that has ended stays as it is."""
        return self._drive(self._wire.cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Cancel a job that has not ended, and erase its prompt and pictures."""
        self._drive(self._wire.delete(job_id))

    def fetch(self, image: JobImage) -> bytes:
        """The file of a picture."""
        return self._drive(self._wire.fetch(image))

    def picture(self, image: JobImage) -> Image.Image:
        """A picture, decoded."""
        return _decoded(self.fetch(image))

    def presets(self) -> dict[str, Any]:
        """Limits, defaults, presets, templates and LoRAs of the served model."""
        return self._drive(self._wire.read("/presets"))

    def usage(self) -> dict[str, Any]:
        """What the API key has used today, and what it may."""
        return self._drive(self._wire.read("/usage"))

    def _cancel_quietly(self, job_id: str) -> None:
        with contextlib.suppress(LuminaError):
            self._drive(self._wire.last_word().cancel(job_id))

    def _drive(self, flow: Flow[T]) -> T:
        answer: httpx.Response | httpx.RequestError | None = None
        with contextlib.closing(flow):
            while True:
                try:
                    wish = flow.send(answer)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(wish, Pause):
                    time.sleep(wish.seconds)
                    answer = None
                    continue
                try:
                    answer = self._http.send(wish)
                except httpx.RequestError as error:
                    answer = error


class AsyncClient:
    """As `Client`, for asyncio."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 4,
        reconnect_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        options = http_options(base_url, api_key, timeout_s)
        self._http = httpx.AsyncClient(transport=transport, **options)
        self._wire = Wire(self._http, max_retries)
        self._reconnect_s = reconnect_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(
        self,
        prompt: str,
        *,
        wait_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Job:
        """Draw and wait: as `Client.generate`; a task that is cancelled cancels its job."""
        job = await self.submit(prompt, idempotency_key=idempotency_key, **fields)
        try:
            job = await self.wait(job.id, timeout_s=wait_s, on_event=on_event)
        except BaseException:
            if idempotency_key is None:
                await self._cancel_quietly(job.id)
            raise
        if job.status != "succeeded":
            raise failure_of(job)
        return job

    async def submit(
        self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[GenerateFields]
    ) -> Job:
        """Queue a job and return it at once."""
        return await self._drive(self._wire.submit(prompt, fields, idempotency_key))

    async def job(self, job_id: str) -> Job:
        """What became of a job."""
        return await self._drive(self._wire.job(job_id))

    async def jobs(self, status: Status | None = None, limit: int = 20) -> AsyncIterator[Job]:
        """Your jobs, the newest first, as many as are read; fetched `limit` at a time."""
        page = await self._drive(self._wire.page("/jobs", status=status, limit=limit))
        for job in page.jobs:
            yield job
        while page.next is not None:
            page = await self._drive(self._wire.page(page.next))
            for job in page.jobs:
                yield job

    async def watch(
        self, job_id: str, *, after: str | None = None, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of a job: as `Client.watch`."""
        feed = EventFeed(self._http, job_id, after, timeout_s, self._reconnect_s)
        while not feed.over():
            try:
                response = await self._http.send(feed.request(), stream=True)
                async with contextlib.aclosing(response):
                    if feed.opened(response):
                        async for text in response.aiter_text():
                            for event in feed.take(text):
                                yield event
                            if feed.over():
                                return
                        feed.lost()
                    else:
                        await response.aread()
                        feed.refused(response)
            except httpx.RequestError as error:
                feed.lost(error)
            if not feed.over():
                await asyncio.sleep(feed.pause_s)

    async def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Job:
        """The job once it has ended, however; `on_event` hears what happens meanwhile."""
        last = None
        async with contextlib.aclosing(self.watch(job_id, timeout_s=timeout_s)) as events:
            async for last in events:
                if on_event is not None:
                    on_event(last)
        return (last.job if last is not None else None) or await self.job(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job; one that has ended stays as it is."""
        return await self._drive(self._wire.cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Cancel a job that has not ended, and erase its prompt and pictures."""
        await self._drive(self._wire.delete(job_id))

    async def fetch(self, image: JobImage) -> bytes:
        """The file of a picture."""
        return await self._drive(self._wire.fetch(image))

    async def picture(self, image: JobImage) -> Image.Image:
        """A picture, decoded."""
        return _decoded(await self.fetch(image))

    async def presets(self) -> dict[str, Any]:
        """Limits, defaults, presets, templates and LoRAs of the served model."""
        return await self._drive(self._wire.read("/presets"))

    async def usage(self) -> dict[str, Any]:
        """What the API key has used today, and what it may."""
        return await self._drive(self._wire.read("/usage"))

    async def _cancel_quietly(self, job_id: str) -> None:
        """Cancel a job, though this task may be being cancelled itself."""
        with contextlib.suppress(LuminaError):
            await asyncio.shield(self._drive(self._wire.last_word().cancel(job_id)))

    async def _drive(self, flow: Flow[T]) -> T:
        answer: httpx.Response | httpx.RequestError | None = None
        with contextlib.closing(flow):
            while True:
                try:
                    wish = flow.send(answer)
                except StopIteration as end:
                    result: T = end.value
                    return result
                if isinstance(wish, Pause):
                    await asyncio.sleep(wish.seconds)
                    answer = None
                    continue
                try:
                    answer = await self._http.send(wish)
                except httpx.RequestError as error:
                    answer = error


def _decoded(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture.copy()
