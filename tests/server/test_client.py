"""The Python client against a real service on a real port, also over connections that break."""

import asyncio
import functools
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.client import (
    ApiError,
    AsyncClient,
    Client,
    DamagedImage,
    Event,
    InvalidInput,
    Job,
    JobCanceled,
    JobFailed,
    Missing,
    WaitTimeout,
)
from tests.server.fake_worker import Service
from tests.server.live import live_service

PROMPT = "a red circle"


def url_of(it: Service) -> str:
    return str(it.client.base_url)


def run(redis_url: str, folder: Path, scenario: Any) -> None:
    """Run a scenario with a live service and an asynchronous client of it."""

    async def main() -> None:
        async with (
            live_service(redis_url, folder) as it,
            AsyncClient(url_of(it)) as client,
        ):
            await scenario(it, client)

    asyncio.run(main())


async def in_thread(it: Service, use: Callable[[Client], Any], **options: Any) -> Any:
    """What `use` returns, called with a synchronous client beside the service's event loop."""

    def call() -> Any:
        with Client(url_of(it), **options) as client:
            return use(client)

    return await asyncio.to_thread(call)


def test_a_picture_from_its_prompt(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        heard: list[Event] = []
        job = await client.generate(PROMPT, seed=7, width=64, num_images=2, on_event=heard.append)
        assert (job.status, job.seed, len(job.images)) == ("succeeded", 7, 2)
        assert job.model_dump() == (await client.job(job.id)).model_dump()
        types = [event.type for event in heard]
        assert types[:2] == ["queued", "started"]
        assert types[-1] == "succeeded"
        steps = [event.step for event in heard if event.type == "progress"]
        assert steps == list(range(21))
        assert {event.total for event in heard if event.type == "progress"} == {20}
        picture = await client.picture(job.images[1])
        data = await client.fetch(job.images[1])
        with Image.open(io.BytesIO(data)) as other:
            assert picture.size == other.size == (64, 128)
            assert picture.tobytes() == other.tobytes()
        assert (await client.presets())["model"] == "demo"

        def synchronously(there: Client) -> Job:
            told: list[Event] = []
            same = there.generate(PROMPT, seed=7, width=64, num_images=2, on_event=told.append)
            assert [event.type for event in told] == types
            assert there.fetch(same.images[1]) == data
            assert there.picture(same.images[0]).size == (64, 128)
            assert there.presets()["model"] == "demo"
            return same

        same = await in_thread(it, synchronously)
        assert [image.sha256 for image in same.images] == [image.sha256 for image in job.images]

    run(redis_url, tmp_path, scenario)


def test_submit_cancel_list_and_delete(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        hanging = await client.submit("hang")
        assert not hanging.finished
        behind = [await client.submit("behind", metadata={"n": n}) for n in range(3)]
        assert behind[1].position is not None
        for job in reversed(behind):
            assert (await client.cancel(job.id)).status == "canceled"
            assert (await client.cancel(job.id)).status == "canceled"
        listed = [job.id async for job in client.jobs(limit=2)]
        assert listed == [job.id for job in (*reversed(behind), hanging)]
        canceled = [job.metadata async for job in client.jobs("canceled", limit=1)]
        assert canceled == [{"n": 2}, {"n": 1}, {"n": 0}]
        await client.delete(hanging.id)
        assert (await client.wait(hanging.id)).status == "canceled"
        with pytest.raises(JobCanceled):
            await client.generate("behind", idempotency_key="k", on_event=cancels(client))

        def synchronously(there: Client) -> None:
            ids = [job.id for job in there.jobs(limit=2)]
            assert set(listed) < set(ids)
            assert len(list(there.jobs("queued"))) == 0
            job = there.submit("hang")
            assert there.job(job.id).id == job.id
            assert there.cancel(job.id).status == "canceled"
            there.delete(job.id)
            assert [event.type for event in there.watch(job.id)][-1] == "canceled"

        await in_thread(it, synchronously)

    run(redis_url, tmp_path, scenario)


def cancels(client: AsyncClient) -> Callable[[Event], None]:
    """Cancels the job it hears of."""
    tasks = []

    def hear(event: Event) -> None:
        if event.type == "queued":
            tasks.append(asyncio.create_task(client.cancel(event.data["id"])))

    return hear


def test_refusals_are_typed_and_say_which_field(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        with pytest.raises(InvalidInput) as refused:
            await client.generate("x", width=65, num_inference_steps=0)
        error = refused.value
        assert (error.status, error.code) == (422, "invalid-request")
        assert set(error.fields) == {"width", "num_inference_steps"}
        assert error.detail == error.fields["width"] == str(error)
        assert error.request_id
        with pytest.raises(InvalidInput, match="did you mean 'num_inference_steps'"):
            await client.submit("x", steps=3)  # type: ignore[call-arg]
        for call in (client.job, client.cancel, client.delete, client.wait):
            with pytest.raises(Missing) as missing:
                await call("no/such?job")
            assert missing.value.code == "not-found"
        with pytest.raises(JobFailed, match="It broke") as failed:
            await client.generate("fail out-of-memory")
        assert failed.value.code == "out-of-memory"
        assert failed.value.job.status == "failed"

        def synchronously(there: Client) -> None:
            with pytest.raises(InvalidInput, match="width"):
                there.submit("x", width=65)
            with pytest.raises(Missing):
                list(there.watch("nosuchjob"))
            with pytest.raises(JobFailed) as raised:
                there.generate("fail")
            assert raised.value.code == "broken"

        await in_thread(it, synchronously)

    run(redis_url, tmp_path, scenario)


def test_who_gives_up_cancels_the_job(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        with pytest.raises(WaitTimeout) as late:
            await client.generate("hang", wait_s=0.3)
        assert (await client.job(late.value.job_id)).status == "canceled"

        seen: list[str] = []
        task = asyncio.create_task(
            client.generate("hang", on_event=lambda event: seen.append(event.data["id"]))
        )
        while not seen:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await client.job(seen[0])).status == "canceled"

        def synchronously(there: Client) -> None:
            with pytest.raises(WaitTimeout) as too_late:
                there.generate("hang", wait_s=0.3)
            assert there.job(too_late.value.job_id).status == "canceled"
            with pytest.raises(KeyboardInterrupt):
                there.generate("hang", on_event=interrupts(seen))
            assert there.job(seen[-1]).status == "canceled"
            # A key by which others may know the job keeps it alive.
            with pytest.raises(WaitTimeout) as kept:
                there.generate("hang", wait_s=0.3, idempotency_key="known")
            assert there.job(kept.value.job_id).status == "running"
            assert there.submit("hang", idempotency_key="known").id == kept.value.job_id

        await in_thread(it, synchronously)

    run(redis_url, tmp_path, scenario)


def interrupts(seen: list[str]) -> Callable[[Event], None]:
    """Stands for a Ctrl-C while the job runs."""

    def hear(event: Event) -> None:
        seen.append(event.data["id"])
        if event.type == "progress":
            raise KeyboardInterrupt

    return hear


class Cut(httpx.AsyncByteStream, httpx.SyncByteStream):
    """A body that breaks off in the middle of its second piece."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def __iter__(self) -> Iterator[bytes]:
        for number, piece in enumerate(self._body):
            if number == 1:
                yield piece[: len(piece) // 2]
                raise httpx.ReadError("cut")
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        number = 0
        async for piece in self._body:
            if number == 1:
                yield piece[: len(piece) // 2]
                raise httpx.ReadError("cut")
            number += 1
            yield piece

    def close(self) -> None:
        self._body.close()

    async def aclose(self) -> None:
        await self._body.aclose()


class CuttingTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """A network that cuts the first streams of events; counts and remembers what was asked."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.asked: list[str | None] = []
        self._sync = httpx.HTTPTransport()
        self._async = httpx.AsyncHTTPTransport()

    def _cut(self, request: httpx.Request, response: httpx.Response) -> httpx.Response:
        if request.url.path.endswith("/events"):
            self.asked.append(request.headers.get("last-event-id"))
            if self.left and response.status_code == 200:
                self.left -= 1
                response.stream = Cut(response.stream)
        return response

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._cut(request, self._sync.handle_request(request))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self._cut(request, await self._async.handle_async_request(request))

    def close(self) -> None:
        self._sync.close()

    async def aclose(self) -> None:
        await self._async.aclose()


def test_a_broken_stream_goes_on_without_gap_or_repeat(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        job = await client.submit(PROMPT)
        network = CuttingTransport(times=2)
        async with AsyncClient(url_of(it), transport=network) as cut_off:
            told = [event async for event in cut_off.watch(job.id)]
        story = [event.id for event in await it.queue.events(job.id)]
        assert [event.id for event in told] == story
        assert network.left == 0
        assert network.asked[0] is None
        assert set(network.asked[1:]) <= set(story)
        assert told[-1].job == await client.job(job.id)

        again = CuttingTransport(times=2)
        use = functools.partial(_ids_watched, job.id)
        assert await in_thread(it, use, transport=again) == story
        assert (again.left, len(again.asked)) == (0, 3)
        # From a known event on; after the last there is nothing.
        rest = [event.id async for event in client.watch(job.id, after=story[3])]
        assert rest == story[4:]
        assert [event async for event in client.watch(job.id, after=story[-1])] == []
        assert await in_thread(it, lambda c: list(c.watch(job.id, after=story[-1]))) == []

    run(redis_url, tmp_path, scenario)


def _ids_watched(job_id: str, client: Client) -> list[str | None]:
    return [event.id for event in client.watch(job_id)]


class LosesFirstAnswer(httpx.AsyncBaseTransport):
    """A network on which a request arrives and its answer does not, once."""

    def __init__(self) -> None:
        self.inner = httpx.AsyncHTTPTransport()
        self.keys: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self.inner.handle_async_request(request)
        self.keys.append(request.headers["idempotency-key"])
        if len(self.keys) == 1:
            await response.aclose()
            raise httpx.RemoteProtocolError("reset")
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


def test_a_lost_answer_makes_no_second_job(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        network = LosesFirstAnswer()
        async with AsyncClient(url_of(it), transport=network) as unlucky:
            job = await unlucky.submit("hang")
        assert len(network.keys) == 2
        assert len(set(network.keys)) == 1
        assert [each.id async for each in client.jobs()] == [job.id]

    run(redis_url, tmp_path, scenario)


def test_damaged_pictures_and_foreign_addresses_are_refused(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service, client: AsyncClient) -> None:
        (image,) = (await client.generate(PROMPT)).images
        with pytest.raises(DamagedImage):
            await client.fetch(image.model_copy(update={"sha256": "0" * 64}))
        for url in ("http://127.0.0.1:1/a.png", "https://example.org/a.png"):
            with pytest.raises(ValueError, match="is not on the server"):
                await client.fetch(image.model_copy(update={"url": url}))
        absolute = image.model_copy(update={"url": url_of(it).rstrip("/") + image.url})
        assert await client.fetch(absolute) == await client.fetch(image)

    run(redis_url, tmp_path, scenario)


def test_errors_form_a_tree() -> None:
    assert issubclass(InvalidInput, ApiError)
    assert issubclass(JobCanceled, JobFailed)


def test_a_job_that_failed_fails_again_under_its_key(redis_url: str, tmp_path: Path) -> None:
    """The server answers a repeated submission with the job's end: that is no server's trouble."""

    async def scenario(it: Service, client: AsyncClient) -> None:
        ids = set()
        for _ in range(2):
            with pytest.raises(JobFailed, match="It broke") as caught:
                await client.generate("fail", idempotency_key="one")
            ids.add(caught.value.job.id)
        assert len(ids) == 1
        hanging = await client.submit("hang", idempotency_key="two")
        await client.cancel(hanging.id)
        await client.wait(hanging.id, timeout_s=30)
        assert (await client.submit("hang", idempotency_key="two")).status == "canceled"
        with pytest.raises(JobCanceled):
            await client.generate("hang", idempotency_key="two")

    run(redis_url, tmp_path, scenario)
