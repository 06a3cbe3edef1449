"""GET /jobs/{id}/events: the whole story once, in order, for every reader, as it happens."""

import asyncio
import base64
import contextlib
import json
from pathlib import Path

import httpx
import pytest
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect

from server.api import events
from server.protocol import DEFAULT_POOL, JobSpec, new_job_id
from server.queue import keys
from server.queue.jobs import Claim, JobQueue
from tests.server.fake_worker import MODEL, Service
from tests.server.live import Sse, live_service, read_events

ASYNC = {"prefer": "respond-async"}


async def follow(it: Service, job_id: str, after: str = "", *, once: bool = False) -> list[Sse]:
    """All events of a job from `after` on; comes back when a stream says so, unless `once`."""
    story: list[Sse] = []
    while True:
        headers = {"last-event-id": after} if after else {}
        async with it.client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            told = [event async for event in read_events(answer)]
        if once or told[-1].retry is None:
            return story + told
        story += [event for event in told if event.event]  # a busy machine: Redis was slow
        after = story[-1].id or after if story else after


async def until_followed(it: Service, job_id: str, readers: int = 1) -> None:
    """Wait until so many readers wait for what happens to a job."""
    waiters = it.app.state.context.queue._changes._waiters
    async with asyncio.timeout(60):
        while len(waiters.get(job_id, ())) < readers:
            await asyncio.sleep(0.01)


async def start(queue: JobQueue, prompt: str = "x") -> Claim:
    """A job of its own, claimed by hand: no worker has it."""
    await queue.submit(new_job_id(), JobSpec(prompt=prompt, seed=1))
    (claim,) = await queue.claim("by-hand", DEFAULT_POOL, 1, 1e9)
    return claim


def test_a_job_is_told_from_its_queue_to_its_picture(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            job = (await it.generate({"prompt": "x", "seed": 3}, **ASYNC)).json()
            story = await follow(it, job["id"])
            types = [event.event for event in story]
            assert types[:2] == ["queued", "started"]
            assert set(types[2:-1]) == {"progress"}
            assert types[-1] == "succeeded"
            assert json.loads(story[1].data or "")["attempt"] == 1
            steps = [json.loads(e.data or "") for e in story if e.event == "progress"]
            assert [step["step"] for step in steps] == list(range(21))
            assert {step["total"] for step in steps} == {20}
            whole = json.loads(story[-1].data or "")
            assert whole == (await it.client.get(f"/jobs/{job['id']}")).json()
            assert {json.loads(event.data or "")["id"] for event in story} == {job["id"]}

            # From any of them on, the rest: no gap, no repeat; after the last, nothing more.
            for place, event in enumerate(story[:-1]):
                rest = await follow(it, job["id"], event.id or "")
                assert [other.id for other in rest] == [e.id for e in story[place + 1 :]]
            done = await it.client.get(
                f"/jobs/{job['id']}/events", headers={"last-event-id": story[-1].id or ""}
            )
            assert (done.status_code, done.content) == (204, b"")

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["failed", "canceled", "expired"])
def test_every_end_is_told_once(redis_url: str, tmp_path: Path, end: str) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path) as it:
            body: dict[str, object] = {"prompt": "fail" if end == "failed" else "hang"}
            if end == "expired":
                body["deadline_s"] = 0.5
            job = (await it.generate(body, **ASYNC)).json()
            reading = asyncio.create_task(follow(it, job["id"]))
            if end == "canceled":
                await it.until(job["id"], "running")
                await it.client.post(f"/jobs/{job['id']}/cancel")
            story = await asyncio.wait_for(reading, 30)
            assert [e.event for e in story if e.event not in ("queued", "started", "progress")] == [
                end
            ]
            assert json.loads(story[-1].data or "")["status"] == end

    asyncio.run(scenario())


def test_previews_are_told_as_they_come_and_only_the_latest(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            claim = await start(it.queue)
            await it.queue.put_preview(claim, b"first")
            await it.queue.put_preview(claim, b"second")
            path = f"/jobs/{claim.job_id}/events"
            async with it.client.stream("GET", path) as answer:
                stream = read_events(answer)
                seen = [await anext(stream)]
                assert await it.queue.watched([claim.job_id]) == {claim.job_id}
                assert seen[0].event == "preview"
                assert seen[0].id is None  # a resumed stream does not depend on it
                shown = json.loads(seen[0].data or "")
                assert base64.b64decode(shown["b64_json"]) == b"second"
                assert shown["media_type"] == "image/jpeg"
                assert [(await anext(stream)).event for _ in range(2)] == ["queued", "started"]
                await it.queue.put_preview(claim, b"third")
                third = await anext(stream)
                assert base64.b64decode(json.loads(third.data or "")["b64_json"]) == b"third"
                await it.queue.put_partial(claim, 0, 0, b"partial")  # of no concern here
                await it.queue.cancel(claim.job_id)
                assert [event.event async for event in stream] == ["canceled"]

    asyncio.run(scenario())


def test_many_readers_read_the_same_and_ask_redis_together(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            it.app.state.context.queue._changes.poll_s = 3600.0  # only messages wake
            claim = await start(it.queue)
            reading = [asyncio.create_task(follow(it, claim.job_id)) for _ in range(20)]
            await until_followed(it, claim.job_id, 20)
            await asyncio.sleep(0.2)
            before = (await it.queue.redis.info("commandstats"))["cmdstat_xrange"]["calls"]
            for step in range(10):
                await it.queue.progress(claim, step, 10)
                await asyncio.sleep(0.02)
            asked = (await it.queue.redis.info("commandstats"))["cmdstat_xrange"]["calls"] - before
            await it.queue.cancel(claim.job_id)
            stories = await asyncio.gather(*reading)
            assert len({tuple(event.id for event in story) for story in stories}) == 1
            assert len(stories[0]) == 2 + 10 + 1
            assert asked < 100, "two hundred without sharing"

    asyncio.run(scenario())


def test_a_service_that_stops_says_when_to_come_back(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            claim = await start(it.queue)
            reading = asyncio.create_task(follow(it, claim.job_id, once=True))
            await until_followed(it, claim.job_id)
            it.app.state.context.stopping.set()
            story = await asyncio.wait_for(reading, 5)
            low, high = events.RETRY_MS
            assert low <= int(story[-1].retry or 0) <= high
            assert story[-1].data is None
            assert {event.event for event in story[:-1]} <= {"queued", "started"}

    asyncio.run(scenario())


def test_jobs_that_cannot_be_followed(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            other = new_job_id()
            await it.queue.submit(other, JobSpec(prompt="x", seed=1), tenant="somebody")
            for job_id in (other, new_job_id(), "nothing"):
                answer = await it.client.get(f"/jobs/{job_id}/events")
                assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
            mine = new_job_id()
            await it.queue.submit(mine, JobSpec(prompt="x", seed=1))
            for place in ("yesterday", "-1-0", "1-1-1", "9" * 40):
                headers = {"last-event-id": place}
                answer = await it.client.get(f"/jobs/{mine}/events", headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")

    asyncio.run(scenario())


def test_a_silent_job_sends_comments() -> None:
    async def quiet():  # type: ignore[no-untyped-def]
        await asyncio.sleep(60)
        yield events.goodbye("never")

    async def scenario() -> None:
        response = events.EventStreamResponse(quiet())
        assert response.ping_interval == 15
        response.ping_interval = 0.02
        sent: list[bytes] = []

        async def send(message):  # type: ignore[no-untyped-def]
            sent.append(message.get("body", b""))

        async def receive():  # type: ignore[no-untyped-def]
            while len(sent) < 4:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        await asyncio.wait_for(response({"type": "http", "method": "GET"}, receive, send), 10)
        assert sent[1:3] == [b": still here\n\n"] * 2

    asyncio.run(scenario())


def test_a_reader_that_takes_nothing_is_let_go_and_nothing_is_kept_for_it() -> None:
    made = 0
    closed = asyncio.Event()

    async def endless():  # type: ignore[no-untyped-def]
        nonlocal made
        try:
            while True:
                made += 1
                yield events.sse("progress", {"step": made})
        finally:
            closed.set()

    async def scenario() -> None:
        async def send(message):  # type: ignore[no-untyped-def]
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the reader's window is full

        async def receive():  # type: ignore[no-untyped-def]
            await asyncio.Event().wait()

        response = events.EventStreamResponse(endless(), slow_reader_s=0.1)
        assert isinstance(response, EventSourceResponse)
        scope = {"type": "http", "method": "GET", "path": "/jobs/x/events"}
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(response(scope, receive, send), 10)
        assert made == 1
        assert closed.is_set()

    asyncio.run(scenario())


def test_a_reader_that_leaves_costs_nothing_more(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            claim = await start(it.queue)
            waiters = it.app.state.context.queue._changes._waiters
            async with it.client.stream("GET", f"/jobs/{claim.job_id}/events") as answer:
                assert (await anext(read_events(answer))).event == "queued"
                assert claim.job_id in waiters
            async with asyncio.timeout(10):
                while claim.job_id in waiters:
                    await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_job_that_expired_from_the_books_ends_its_stream(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, worker=False) as it:
            claim = await start(it.queue)
            reading = asyncio.create_task(follow(it, claim.job_id))
            await until_followed(it, claim.job_id)
            await asyncio.sleep(0.1)
            await it.queue.redis.delete(keys.job(claim.job_id), keys.events(claim.job_id))
            story = await asyncio.wait_for(reading, 10)
            assert [event.event for event in story] == ["queued", "started"]

    asyncio.run(scenario())


def test_redis_away_ends_a_stream_with_a_hint(tmp_path: Path) -> None:
    from server.embedded import EmbeddedRedis

    redis = EmbeddedRedis(tmp_path)
    redis.start()

    async def scenario() -> None:
        async with live_service(redis.url, tmp_path, worker=False) as it:
            await it.queue.publish_model(DEFAULT_POOL, MODEL)
            claim = await start(it.queue)
            reading = asyncio.create_task(follow(it, claim.job_id, once=True))
            await until_followed(it, claim.job_id)
            await asyncio.sleep(0.2)
            redis.stop()
            story = await asyncio.wait_for(reading, 20)
            assert story[-1].retry is not None
            with contextlib.suppress(httpx.HTTPError):
                assert (await it.client.get(f"/jobs/{claim.job_id}/events")).status_code == 503

    asyncio.run(scenario())
