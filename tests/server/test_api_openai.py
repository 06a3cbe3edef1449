"""The OpenAI images API with the unmodified `openai` client: streams, errors, retries."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from tests.server.fake_worker import Service, service
from tests.server.live import Sse, live_service, read_events


def opened(b64_json: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json or "")))


@asynccontextmanager
async def clients(
    redis_url: str, folder: Path, **changes: object
) -> AsyncIterator[tuple[Service, AsyncOpenAI]]:
    """A live service and an asynchronous client of it that does not retry."""
    async with (
        live_service(redis_url, folder, **changes) as it,
        AsyncOpenAI(base_url=f"{it.client.base_url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield it, client


async def in_thread(it: Service, act: Callable[[OpenAI], Any], max_retries: int = 0) -> Any:
    """Let a synchronous client do something beside this event loop."""

    def run() -> Any:
        with OpenAI(
            base_url=f"{it.client.base_url}/v1", api_key="any", max_retries=max_retries
        ) as client:
            return act(client)

    return await asyncio.to_thread(run)


async def draw(client: AsyncOpenAI, **fields: Any) -> list[Any]:
    """The answer as a list: of one response, or of the events of a stream."""
    answer = await client.images.generate(**fields)
    return [event async for event in answer] if fields.get("stream") else [answer]


def test_the_synchronous_client_gets_pictures(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, _):
            answer = await in_thread(
                it,
                lambda client: client.images.generate(
                    model="demo", prompt="three yellow stars", n=2, size="64x96",
                    user="me", quality="high", background="transparent", moderation="low",
                    style="vivid", extra_body={"seed": 5},
                ),
            )  # fmt: skip
            assert isinstance(answer, openai.types.ImagesResponse)
            assert answer.created > 1_700_000_000
            assert (answer.size, answer.output_format, answer.background) == (
                "64x96", "png", "opaque",
            )  # fmt: skip
            assert answer.data is not None
            pictures = [opened(each.b64_json) for each in answer.data]
            assert [(p.format, p.size) for p in pictures] == [("PNG", (64, 96))] * 2
            assert pictures[0].tobytes() != pictures[1].tobytes()
            assert answer.usage is not None
            assert answer.usage.input_tokens == 3
            assert answer.usage.output_tokens == 2 * 4 * 6
            assert answer.usage.total_tokens == 3 + 48

            again = await in_thread(
                it,
                lambda client: client.images.generate(
                    prompt="three yellow stars", size="64x96", extra_body={"seed": 6}
                ),
            )
            assert again.data[0].b64_json == answer.data[1].b64_json  # image k has seed s + k
            assert [model.id for model in await in_thread(it, lambda c: list(c.models.list()))] == [
                "demo"
            ]
            one = await in_thread(it, lambda client: client.models.retrieve("demo"))
            assert (one.id, one.object) == ("demo", "model")

    asyncio.run(scenario())


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_urls_and_formats(redis_url: str, tmp_path: Path, output_format: Any) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, client):
            answer = await client.images.generate(
                prompt="x", response_format="url", output_format=output_format,
                output_compression=0, size="auto",
            )  # fmt: skip
            assert answer.data is not None
            url = answer.data[0].url or ""
            assert url.startswith(str(it.client.base_url))
            assert answer.data[0].b64_json is None
            picture = (await it.client.get(url)).content
            assert Image.open(io.BytesIO(picture)).format == output_format.upper()
            assert Image.open(io.BytesIO(picture)).size == (128, 128)

    asyncio.run(scenario())


@pytest.mark.parametrize("partial_images", [0, 1, 2, 3])
def test_a_stream_shows_exactly_the_partial_pictures_asked_for(
    redis_url: str, tmp_path: Path, partial_images: int
) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (_, client):
            stream = await client.images.generate(
                prompt="x", stream=True, partial_images=partial_images, n=2, size="96x64",
                extra_body={"seed": 3},
            )  # fmt: skip
            events = [event async for event in stream]
            partials = [e for e in events if e.type == "image_generation.partial_image"]
            done = [e for e in events if e.type == "image_generation.completed"]
            assert events == partials + done
            for image in range(2):
                mine = [e for e in partials if e.image_index == image]  # type: ignore[attr-defined]
                assert [e.partial_image_index for e in mine] == list(range(partial_images))
                shown = [opened(e.b64_json) for e in (*mine, done[image])]
                assert {picture.format for picture in shown} == {"PNG"}
                assert {picture.size for picture in shown} == {(96, 64)}
                assert len({picture.convert("RGB").tobytes() for picture in shown}) == len(shown)
            for event in events:
                assert (event.size, event.output_format) == ("96x64", "png")
                assert (event.quality, event.background) == ("auto", "opaque")
                assert event.created_at > 1_700_000_000
            assert done[0].usage.total_tokens == 1 + 6 * 4

    asyncio.run(scenario())


def test_the_synchronous_client_streams_too(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, _):
            kinds = await in_thread(
                it,
                lambda client: [
                    (event.type, event.output_format)
                    for event in client.images.generate(
                        prompt="x", stream=True, partial_images=1, output_format="webp"
                    )
                ],
            )
            assert kinds == [
                ("image_generation.partial_image", "webp"), ("image_generation.completed", "webp"),
            ]  # fmt: skip

    asyncio.run(scenario())


def test_the_stream_on_the_wire(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            body = {"prompt": "x", "stream": True, "partial_images": 1, "size": "64x64"}
            async with it.client.stream("POST", "/v1/images/generations", json=body) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                seen: list[Sse] = [event async for event in read_events(answer)]
            for event in seen:
                assert json.loads(event.data or "")["type"] == event.event
            fields = {"type", "b64_json", "created_at", "size", "quality", "background"}
            partial, done = [json.loads(event.data or "") for event in seen]
            assert partial.keys() >= fields | {"output_format", "partial_image_index"}
            assert done.keys() >= fields | {"output_format", "usage"}

    asyncio.run(scenario())


# (fields beside the prompt, the client's exception, code, parameter at fault)
BAD_REQUESTS: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = [
    ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model"),
    ({"prompt": ""}, openai.BadRequestError, "invalid_request", "prompt"),
    ({"prompt": "x" * 4097}, openai.BadRequestError, "invalid_request", "prompt"),
    ({"size": "63x64"}, openai.BadRequestError, "invalid_request", "size"),
    ({"size": "1024x1024"}, openai.BadRequestError, "invalid_request", "size"),
    ({"size": "large"}, openai.BadRequestError, "invalid_request", "size"),
    ({"n": 0}, openai.BadRequestError, "invalid_request", "n"),
    ({"n": 9}, openai.BadRequestError, "invalid_request", "n"),
    ({"partial_images": 4}, openai.BadRequestError, "invalid_request", "partial_images"),
    ({"output_format": "gif"}, openai.BadRequestError, "invalid_request", "output_format"),
    ({"response_format": "file"}, openai.BadRequestError, "invalid_request", "response_format"),
    ({"extra_body": {"seed": "1"}}, openai.BadRequestError, "invalid_request", "seed"),
    ({"extra_body": {"steps": 3}}, openai.BadRequestError, "invalid_request", "steps"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_the_clients_own_exceptions(
    redis_url: str, tmp_path: Path, stream: bool
) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (_, client):
            for fields, error, code, param in BAD_REQUESTS:
                with pytest.raises(error) as caught:
                    await client.images.generate(**{"prompt": "x", "stream": stream, **fields})
                assert (caught.value.code, caught.value.param) == (code, param)
                assert caught.value.type == "invalid_request_error"
                assert isinstance(caught.value.body, dict)
                assert caught.value.body["message"]

    asyncio.run(scenario())


def test_everything_below_v1_speaks_openai(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            url = "/v1/images/generations"
            typed = {"content-type": "application/json"}
            asked: list[tuple[httpx.Response, int, str]] = [
                (await it.client.get("/v1/nothing"), 404, "not_found"),
                (await it.client.get(url), 405, "method_not_allowed"),
                (await it.client.get("/v1/models/none"), 404, "model_not_found"),
                (await it.client.post(url, content=b"{", headers=typed), 400, "malformed_body"),
                (await it.client.post(url, content=b"[]", headers=typed), 400, "invalid_request"),
                (await it.client.post(url, content=b"{}"), 415, "not_json"),
                (await it.client.post(url, content=b" " * 70_000, headers=typed), 413,
                 "body_too_large"),
                (await it.client.post(url, json={"prompt": "fail"}), 500, "job_failed"),
                (await it.client.post(url, json={"prompt": "fail out-of-memory"}), 503,
                 "out_of_memory"),
            ]  # fmt: skip
            for answer, status, code in asked:
                assert answer.status_code == status
                assert answer.headers["content-type"] == "application/json"
                error = answer.json()["error"]
                assert (error["code"], set(error)) == (code, {"message", "type", "param", "code"})
                assert error["type"] == (
                    "server_error" if status >= 500 else "invalid_request_error"
                )
            assert asked[-2][0].headers["x-should-retry"] == "false"
            assert "x-should-retry" not in asked[-1][0].headers

    asyncio.run(scenario())


def test_no_model_is_a_503_for_clients_too(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            for answer in (
                await it.client.get("/v1/models"),
                await it.client.post("/v1/images/generations", json={"prompt": "x"}),
            ):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "model_not_ready"
                assert "retry-after" in answer.headers

    asyncio.run(scenario())


def test_a_client_that_retries_gets_through(redis_url: str, tmp_path: Path) -> None:
    """The queue is full at first; the client comes back by itself, as `Retry-After` says."""

    async def scenario() -> None:
        async with clients(redis_url, tmp_path, tenant_limit=1) as (it, _):
            blocker = (await it.generate({"prompt": "hang"}, prefer="respond-async")).json()
            with pytest.raises(openai.RateLimitError) as caught:
                await in_thread(it, lambda client: client.images.generate(prompt="x"))
            assert caught.value.code == "rate_limit_exceeded"
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 120

            refused = threading.Event()

            def watch(response: Any) -> None:
                if response.status_code == 429:
                    refused.set()

            def draw() -> Any:
                with OpenAI(
                    base_url=f"{it.client.base_url}/v1", api_key="any", max_retries=20
                ) as client:
                    client._client.event_hooks["response"].append(watch)
                    return client.images.generate(prompt="x")

            drawing = asyncio.create_task(asyncio.to_thread(draw))
            await asyncio.to_thread(refused.wait, 20)
            await it.client.post(f"/jobs/{blocker['id']}/cancel")
            answer = await drawing
            assert opened(answer.data[0].b64_json).size == (128, 128)

    asyncio.run(scenario())


def test_a_job_that_fails_is_not_tried_again_by_the_client(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, _):
            with pytest.raises(openai.InternalServerError) as caught:
                await in_thread(it, lambda c: c.images.generate(prompt="fail"), max_retries=5)
            assert caught.value.code == "job_failed"
            assert len(await it.queue.redis.keys("{lumina}:job:*")) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_past_the_limit_is_a_504_and_the_job_is_canceled(
    redis_url: str, tmp_path: Path, stream: bool
) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path, sync_timeout=0.5) as (it, client):
            with pytest.raises(openai.APIError) as caught:
                await draw(client, prompt="hang", stream=stream)
            assert caught.value.code == "timeout"
            assert caught.value.type == "server_error"
            if not stream:
                assert isinstance(caught.value, openai.InternalServerError)
                assert caught.value.status_code == 504
            (key,) = await it.queue.redis.keys("{lumina}:job:*")
            assert (await it.until(key.rsplit(":", 1)[1], "canceled"))["status"] == "canceled"

            # With a key the job goes on, and asking again joins it.
            headers = {"Idempotency-Key": "mine"}
            for _ in range(2):
                with pytest.raises(openai.APIError):
                    await draw(client, prompt="hang", stream=stream, extra_headers=headers)
            assert len(await it.queue.redis.keys("{lumina}:job:*")) == 2
            listed = (await it.client.get("/jobs")).json()["jobs"]
            assert listed[0]["status"] == "running"

    asyncio.run(scenario())


def test_an_error_in_the_middle_of_a_stream(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, client):
            with pytest.raises(openai.APIError) as caught:
                async for _ in await client.images.generate(prompt="fail", stream=True):
                    pass
            assert (caught.value.code, caught.value.message) == ("job_failed", "It broke.")
            stream = await client.images.generate(prompt="hang", stream=True, partial_images=1)
            while not (listed := (await it.client.get("/jobs?status=running")).json()["jobs"]):
                await asyncio.sleep(0.01)
            await it.client.post(f"/jobs/{listed[0]['id']}/cancel")
            with pytest.raises(openai.APIError) as caught:
                [event async for event in stream]
            assert caught.value.code == "job_canceled"

    asyncio.run(scenario())


def test_closing_a_stream_cancels_its_job(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, client):
            stream = await client.images.generate(prompt="hang", stream=True, partial_images=2)
            while not (listed := (await it.client.get("/jobs?status=running")).json()["jobs"]):
                await asyncio.sleep(0.01)
            await stream.close()
            await it.until(listed[0]["id"], "canceled")

    asyncio.run(scenario())


def test_a_key_replays_a_stream(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, client):
            headers = {"Idempotency-Key": "again"}
            asked = {
                "prompt": "x", "stream": True, "partial_images": 2, "extra_headers": headers,
            }  # fmt: skip
            pictures = []
            for _ in range(2):
                events = await draw(client, **asked)
                pictures.append(events[-1].b64_json)
                assert len(events) == 3
            assert pictures[0] == pictures[1]
            with pytest.raises(openai.BadRequestError) as caught:
                await client.images.generate(prompt="y", extra_headers=headers)
            assert caught.value.code == "idempotency_mismatch"
            (job,) = (await it.client.get("/jobs")).json()["jobs"]
            await it.client.delete(f"/jobs/{job['id']}")
            with pytest.raises(openai.APIError) as gone:
                await draw(client, **asked)
            assert gone.value.code == "not_found"

    asyncio.run(scenario())


def test_a_service_that_stops_ends_a_stream_with_an_error(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with clients(redis_url, tmp_path) as (it, client):
            stream = await client.images.generate(prompt="hang", stream=True)
            it.app.state.context.stopping.set()
            with pytest.raises(openai.APIError, match="stops"):
                [event async for event in stream]

    asyncio.run(scenario())
