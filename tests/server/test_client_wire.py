"""What the client repeats and what not, how it reads events, and that it fits the server."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.answers import JobAnswer
from server.api.schemas import GenerateBody
from server.client import (
    AsyncClient,
    Client,
    InvalidInput,
    NotAllowed,
    NotReachable,
    ServerTrouble,
    TooManyRequests,
    WaitTimeout,
)
from server.client_types import Event, GenerateFields, Job
from server.client_wire import _SseReader

ROOT = Path(__file__).parents[2]
JOB = {"id": "j1", "status": "queued"}
URL = "http://lumina.example"


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"type": f"urn:x:{code}", "code": code, "detail": f"It is {code}.", "status": status}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json=body, headers=named)


class Script:
    """A server that answers as written down, and remembers the requests."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def client_of(script: Callable[[httpx.Request], httpx.Response], **options: object) -> Client:
    return Client(URL, transport=httpx.MockTransport(script), **options)  # type: ignore[arg-type]


def test_what_passes_is_asked_again_with_the_same_key() -> None:
    busy = problem(503, "queue-full", retry_after="0")
    many = problem(429, "too-many-jobs", retry_after="0")
    proxy = httpx.Response(502, text="<html>bad gateway</html>", headers={"retry-after": "0"})
    script = Script(busy, many, proxy, httpx.Response(202, json=JOB))
    with client_of(script, api_key="secret") as client:
        assert client.submit("x", seed=None, width=64).id == "j1"
    keys = {request.headers["idempotency-key"] for request in script.requests}
    assert (len(script.requests), len(keys)) == (4, 1)
    request = script.requests[0]
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["prefer"] == "respond-async"
    assert request.headers["user-agent"].startswith("lumina-serve/")
    assert json.loads(request.content) == {"prompt": "x", "width": 64}


@pytest.mark.parametrize("api_key", ["two words", "line\nbreak", "sch\u00f6n", "\x00"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(api_key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be") as caught:
        Client(URL, api_key=api_key)
    assert api_key not in str(caught.value)


def test_blanks_around_a_key_are_not_part_of_it() -> None:
    script = Script(httpx.Response(200, json=JOB))
    with client_of(script, api_key=" lumina_x\n") as client:  # as a file has it
        client.job("j1")
    assert script.requests[0].headers["authorization"] == "Bearer lumina_x"


def test_two_submissions_have_two_keys() -> None:
    script = Script(*(httpx.Response(202, json=JOB) for _ in range(3)))
    with client_of(script) as client:
        client.submit("x")
        client.submit("x")
        client.submit("x", idempotency_key="mine")
    one, two, mine = (request.headers["idempotency-key"] for request in script.requests)
    assert one != two
    assert mine == "mine"


def test_a_lost_connection_is_tried_again() -> None:
    script = Script(httpx.ConnectError("refused"), httpx.Response(200, json=JOB))
    with client_of(script) as client:
        assert client.job("j1").id == "j1"

    async def asynchronously() -> None:
        again = Script(httpx.ReadTimeout("slow"), httpx.Response(200, json=JOB))
        async with AsyncClient(URL, transport=httpx.MockTransport(again)) as client:
            assert (await client.job("j1")).id == "j1"

    asyncio.run(asynchronously())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(503, "deadline-too-short", retry_after="0"), ServerTrouble),
        (problem(503, "data-lost", retry_after="0"), ServerTrouble),
        (problem(429, "quota-used", retry_after="3600"), TooManyRequests),
        (problem(500, "internal"), ServerTrouble),
        (problem(422, "invalid-request"), InvalidInput),
        (problem(401, "no-key"), NotAllowed),
        (httpx.Response(200, text="<html>"), ServerTrouble),
        (httpx.Response(200, json={"id": 3}), ServerTrouble),
        (httpx.UnsupportedProtocol("gopher"), NotReachable),
    ],
)
def test_what_does_not_pass_is_asked_once(
    answer: httpx.Response | Exception, error: type[Exception]
) -> None:
    script = Script(answer)
    with client_of(script) as client, pytest.raises(error):
        client.job("j1")
    assert len(script.requests) == 1


def test_after_the_last_retry_the_last_answer_counts() -> None:
    script = Script(*(problem(503, "queue-full", retry_after="0") for _ in range(3)))
    with client_of(script, max_retries=2) as client, pytest.raises(ServerTrouble) as raised:
        client.submit("x")
    assert (raised.value.code, raised.value.retry_after_s) == ("queue-full", 0)
    assert not script.answers
    none = Script(httpx.ConnectError("refused"))
    with client_of(none, max_retries=0) as client, pytest.raises(NotReachable, match="refused"):
        client.job("j1")


def test_a_server_that_stays_away_ends_a_watch() -> None:
    away = client_of(Script(httpx.ConnectError("gone")), reconnect_s=0)
    with away as client, pytest.raises(NotReachable, match="gone"):
        list(client.watch("j1"))
    empty = httpx.Response(200, text="")
    with client_of(Script(empty), reconnect_s=0) as client, pytest.raises(NotReachable):
        list(client.watch("j1"))
    busy = problem(503, "queue-unavailable", retry_after="0")
    with client_of(Script(busy), reconnect_s=0) as client, pytest.raises(ServerTrouble):
        list(client.watch("j1"))
    with client_of(Script(httpx.ReadTimeout("silent"))) as client, pytest.raises(WaitTimeout):
        list(client.watch("j1", timeout_s=0))


def test_a_watch_comes_back_when_the_server_says() -> None:
    first = "event: queued\nid: 1-0\ndata: {}\n\n: stopping\nretry: 10\n\n"
    last = 'id: 2-0\nevent: succeeded\ndata: {"id": "j1", "status": "succeeded"}\n\n'
    script = Script(
        problem(503, "queue-unavailable", retry_after="0"),
        httpx.Response(200, text=first),
        httpx.Response(200, text=last),
    )
    with client_of(script) as client:
        events = list(client.watch("j1", after="0-5"))
    assert [event.type for event in events] == ["queued", "succeeded"]
    assert events[-1].job is not None
    sent = [request.headers.get("last-event-id") for request in script.requests]
    assert sent == ["0-5", "0-5", "1-0"]


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://[::1", "//x", "redis://x"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        Client(url)


@pytest.mark.parametrize("key", ["lumina_é", "two words", "two\nlines"])
def test_what_is_no_api_key_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(ValueError, match="api_key must be printable ASCII") as caught:
        Client(URL, api_key=key)
    assert key not in str(caught.value)


def test_a_prefix_is_kept() -> None:
    script = Script(httpx.Response(200, json=JOB))
    with Client(f"{URL}/lumina/", transport=httpx.MockTransport(script)) as client:
        client.job("j1")
    assert script.requests[0].url == f"{URL}/lumina/jobs/j1"


STREAM = (
    ": hello\n\n"
    'id: 1-0\nevent: queued\ndata: {"id": "a",\ndata: "note": "x\u2028y\x85z ☂"}\n\n'
    "event: noise\n\n"  # without data: no event
    "data: 3\n\n"  # without a name: none of ours
    "event: broken\ndata: {\n\n"
    "retry: 1500\n\n"
    'event:preview\ndata:{"b64_json": "/9j/"}\n\n'
    'event: succeeded\nid: 2-0\ndata: {"id": "a", "status": "succeeded"}\n\n'
    "event: never\ndata: {}"
)
EVENTS = [
    Event("queued", {"id": "a", "note": "x\u2028y\x85z ☂"}, "1-0"),
    Event("preview", {"b64_json": "/9j/"}),
    Event("succeeded", {"id": "a", "status": "succeeded"}, "2-0"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12), st.sampled_from(["\n", "\r\n", "\r"]))
def test_events_are_read_however_the_text_is_cut(cuts: list[int], end: str) -> None:
    text = STREAM.replace("\n", end)
    reader = _SseReader()
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    events = [event for piece in pieces for event in reader.feed(piece)]
    assert events == EVENTS
    assert reader.retry_s == 1.5
    assert events[1].preview == b"\xff\xd8\xff"


def test_the_client_knows_what_the_server_takes_and_gives() -> None:
    ours, theirs = set(GenerateFields.__annotations__), set(GenerateBody.model_fields)
    assert theirs - {"prompt"} <= ours
    assert ours - theirs <= {"webhook_url"}
    assert set(JobAnswer.model_fields) <= set(Job.model_fields)


def test_an_answer_of_another_version_is_read() -> None:
    job = Job.model_validate({"id": "a", "status": "running", "colour": "blue"})
    assert (job.finished, job.images, job.step) == (False, (), 0)


def test_the_client_needs_little() -> None:
    blocked = ["torch", "fastapi", "starlette", "redis", "structlog", "fsspec", "model"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
        "import server.client, server.remote; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("fine\n", "")
