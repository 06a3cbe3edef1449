"""The Python client without its sockets: requests, retries, answers and the reading of events.

A `Flow` is a generator that yields requests and pauses and is sent the answers; the synchronous and
the asynchronous client differ only in who drives it.
"""

import hashlib
import json
import random
import re
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, RootModel, ValidationError

from server.api.address import is_loopback
from server.client_types import (
    ApiError,
    DamagedImage,
    Event,
    InvalidInput,
    Job,
    JobImage,
    Missing,
    NotAllowed,
    NotReachable,
    ServerTrouble,
    TooManyRequests,
    WaitTimeout,
)

SILENCE_S = 45.0  # the server says something at least every 15 s
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
LAST_WORD_S = 5.0
LONGEST_RETRY_S = 60.0  # what the server asks to wait longer for is the caller's to decide

_RETRIED = frozenset({429, 502, 503, 504})
_HOPELESS = frozenset({"deadline-too-short", "data-lost"})  # a 503 that another try does not cure
_LINE_END = re.compile(r"\r\n|\n|\r")

T = TypeVar("T")


@dataclass(frozen=True)
class Pause:
    """Wait so many seconds before going on."""

    seconds: float


Answer = httpx.Response | httpx.RequestError
Flow = Generator[httpx.Request | Pause, Answer | None, T]


@dataclass(frozen=True)
class Page:
    """Some jobs, and where the next are."""

    jobs: list[Job]
    next: str | None


class _Jobs(BaseModel):
    jobs: list[Job]


class _Document(RootModel[dict[str, Any]]):
    pass


M = TypeVar("M", bound=BaseModel)


def _read(kind: type[M], response: httpx.Response) -> M:
    """Read an answer; raises ServerTrouble for one that no server of this kind sends."""
    try:
        return kind.model_validate_json(response.content)
    except ValidationError:
        sentence = f"{response.request.url} gave no answer of a lumina server"
        raise ServerTrouble(response.status_code, "no-answer", sentence) from None


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def http_options(base_url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Arguments of an httpx client; raises ValueError for what is no address or key."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"url {base_url!r}: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"url {base_url!r} must be like http://127.0.0.1:8000")
    headers = {"User-Agent": f"lumina-serve/{metadata.version('lumina-serve')}"}
    if api_key and not re.fullmatch("[!-~]+", api_key):
        raise ValueError("api_key must be printable ASCII without blanks")
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    # No proxy leads to this machine itself.
    return {
        "base_url": url, "headers": headers, "timeout": timeout_s,
        "trust_env": not is_loopback(url.host),
    }  # fmt: skip


class Wire:
    """The requests of a client, each a Flow that repeats what is safe to repeat."""

    def __init__(
        self,
        http: httpx.Client | httpx.AsyncClient,
        max_retries: int,
        timeout_s: float | None = None,
    ) -> None:
        self.http = http
        self._max_retries = max_retries
        self._more: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}

    def last_word(self) -> "Wire":
        """For callers who want to leave: one try, and a short one."""
        return Wire(self.http, max_retries=0, timeout_s=LAST_WORD_S)

    def submit(
        self, prompt: str, fields: Mapping[str, Any], idempotency_key: str | None
    ) -> Flow[Job]:
        """Queue a job. Its key makes it safe to send again after a lost answer."""
        body = {"prompt": prompt} | {k: v for k, v in fields.items() if v is not None}
        headers = {
            "Prefer": "respond-async",
            "Idempotency-Key": idempotency_key or str(uuid.uuid4()),
        }
        return (yield from self._job("POST", "/generate", json=body, headers=headers))

    def job(self, job_id: str) -> Flow[Job]:
        """What became of a job."""
        return (yield from self._job("GET", _path(job_id)))

    def cancel(self, job_id: str) -> Flow[Job]:
        """Cancel a job."""
        return (yield from self._job("POST", f"{_path(job_id)}/cancel"))

    def delete(self, job_id: str) -> Flow[None]:
        """Erase a job."""
        yield from self._ask("DELETE", _path(job_id))

    def page(self, path: str, **query: Any) -> Flow[Page]:
        """Some jobs of a listing."""
        given = {name: value for name, value in query.items() if value is not None}
        response = yield from self._ask("GET", path, params=given or None)
        jobs = _read(_Jobs, response).jobs
        return Page(jobs, response.links.get("next", {}).get("url"))

    def fetch(self, image: JobImage) -> Flow[bytes]:
        """The bytes of a picture; raises DamagedImage unless they are those of the job."""
        response = yield from self._ask("GET", image.url)
        if hashlib.sha256(response.content).hexdigest() != image.sha256:
            raise DamagedImage(f"{image.url}: the bytes are not those of the job")
        return response.content

    def read(self, path: str) -> Flow[dict[str, Any]]:
        """A document of the server."""
        response = yield from self._ask("GET", path)
        return _read(_Document, response).root

    def _job(self, method: str, path: str, **content: Any) -> Flow[Job]:
        response = yield from self._ask(method, path, **content)
        return _read(Job, response)

    def _ask(self, method: str, path: str, **content: Any) -> Flow[httpx.Response]:
        for attempt in range(self._max_retries + 1):
            request = self.http.build_request(method, path, **content, **self._more)
            self._keep_home(request)
            answer = yield request
            assert answer is not None
            if isinstance(answer, httpx.Response) and answer.is_success:
                return answer
            seconds = pause_before_retry(answer, attempt)
            if seconds is None or attempt == self._max_retries:
                raise error_of(answer)
            yield Pause(seconds)
        raise AssertionError("the last attempt returns or raises")

    def _keep_home(self, request: httpx.Request) -> None:
        """A picture elsewhere must not be told the API key."""
        home = self.http.base_url
        there = request.url
        if (there.scheme, there.host, there.port) != (home.scheme, home.host, home.port):
            raise ValueError(f"{there} is not on the server {home}")


def pause_before_retry(answer: Answer, attempt: int) -> float | None:
    """Seconds to wait before asking again, None where that would not help."""
    backoff = _backoff(attempt)
    if isinstance(answer, httpx.UnsupportedProtocol):
        return None
    if isinstance(answer, httpx.RequestError):
        return backoff
    error = error_of(answer)
    if answer.status_code not in _RETRIED or not isinstance(error, ApiError):
        return None
    if error.code in _HOPELESS:
        return None
    if error.retry_after_s is None:
        return backoff
    return error.retry_after_s if error.retry_after_s <= LONGEST_RETRY_S else None


def _backoff(failures: int) -> float:
    longest: float = min(FIRST_PAUSE_S * 2.0**failures, LONGEST_PAUSE_S)
    return longest * random.uniform(0.75, 1.25)


def error_of(answer: Answer) -> ApiError | NotReachable:
    """The error of an answer that is none, or that is no success."""
    if isinstance(answer, httpx.RequestError):
        return NotReachable(f"the server does not answer: {str(answer) or type(answer).__name__}")
    problem = _problem(answer)
    status = answer.status_code
    kinds = {400: InvalidInput, 401: NotAllowed, 403: NotAllowed, 404: Missing, 413: InvalidInput}
    kinds |= {415: InvalidInput, 422: InvalidInput, 429: TooManyRequests}
    kind = kinds.get(status, ServerTrouble if status >= 500 else ApiError)
    errors = problem.get("errors") or []
    after = answer.headers.get("retry-after", "")
    return kind(
        status,
        str(problem.get("code", "http-error")),
        str(problem.get("detail") or f"{answer.request.url} answered {status}"),
        fields={str(e["field"]): str(e["detail"]) for e in errors},
        job_id=problem.get("job"),
        request_id=problem.get("request_id") or answer.headers.get("x-request-id"),
        retry_after_s=float(after) if after.isdigit() else None,
    )


def _problem(answer: httpx.Response) -> dict[str, Any]:
    """The problem of an answer; empty where a proxy has put words of its own in between."""
    try:
        problem = answer.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


class EventFeed:
    """The events of a job over as many connections as it takes, without gap or repeat.

    Args:
        http: builds the requests.
        job_id: of the job.
        after: the id of the last event that is known already.
        timeout_s: how long to follow, or None; WaitTimeout after that.
        reconnect_s: how long to try without hearing anything.
    """

    def __init__(
        self,
        http: httpx.Client | httpx.AsyncClient,
        job_id: str,
        after: str | None,
        timeout_s: float | None,
        reconnect_s: float,
    ) -> None:
        self._http, self._job_id, self._last_id = http, job_id, after
        self._timeout_s, self._reconnect_s = timeout_s, reconnect_s
        self._started = self._heard = time.monotonic()
        self._pause_s: float | None = None
        self._failures = 0
        self._reader = _SseReader()
        self._over = False

    def over(self) -> bool:
        """Whether everything has been told."""
        return self._over

    def request(self) -> httpx.Request:
        """The request of the next connection."""
        self._reader = _SseReader()
        headers = {"Accept": "text/event-stream"}
        if self._last_id is not None:
            headers["Last-Event-ID"] = self._last_id
        # Once time is up the silence ends, and `lost` says why.
        silence_s = min(SILENCE_S, max(self._left_s(), 0.0) + 0.05)
        timeout = httpx.Timeout(self._http.timeout.connect, read=silence_s)
        path = f"{_path(self._job_id)}/events"
        return self._http.build_request("GET", path, headers=headers, timeout=timeout)

    def opened(self, response: httpx.Response) -> bool:
        """Whether `response` brings events; if not, read its body and call `refused`."""
        self._over = response.status_code == 204  # the job has ended and all has been told
        return response.status_code == 200

    def refused(self, response: httpx.Response) -> None:
        """Note an answer without events; raises ApiError where another try would not help."""
        if self._over:
            return
        seconds = pause_before_retry(response, self._failures)
        if seconds is None:
            raise error_of(response)
        self.lost(response, seconds)

    def take(self, text: str) -> list[Event]:
        """The events that a piece of the stream completes; raises WaitTimeout."""
        events = self._reader.feed(text)
        self._heard, self._failures = time.monotonic(), 0
        self._pause_s = self._reader.retry_s
        for event in events:
            self._last_id = event.id or self._last_id
            self._over = self._over or event.last
        if not self._over:
            self._check_time()
        return events

    def lost(self, answer: Answer | None = None, pause_s: float | None = None) -> None:
        """Note a connection that ended before the job; raises NotReachable after too many."""
        if self._over:
            return
        self._check_time()
        if time.monotonic() - self._heard > self._reconnect_s:
            if answer is not None:
                raise error_of(answer)
            raise NotReachable(f"the events of job {self._job_id} end before they begin")
        self._pause_s = pause_s or self._reader.retry_s or _backoff(self._failures)
        self._failures = min(self._failures + 1, 10)

    @property
    def pause_s(self) -> float:
        """How long to wait before the next connection."""
        return min(self._pause_s or FIRST_PAUSE_S, max(self._left_s(), 0.0))

    def _left_s(self) -> float:
        if self._timeout_s is None:
            return float("inf")
        return self._started + self._timeout_s - time.monotonic()

    def _check_time(self) -> None:
        if self._timeout_s is not None and self._left_s() <= 0:
            raise WaitTimeout(self._job_id, self._timeout_s)


class _SseReader:
    """Text in pieces to events, as the HTML standard has it (9.2.6, without its byte order mark).

    Lines end at CR, LF or CRLF only: JSON may hold what other line splitters take for an end.
    """

    def __init__(self) -> None:
        self.retry_s: float | None = None
        self._text = ""
        self._fields: dict[str, list[str]] = {}

    def feed(self, piece: str) -> list[Event]:
        self._text += piece
        held = "\r" if self._text.endswith("\r") else ""  # perhaps half of a CRLF
        *lines, rest = _LINE_END.split(self._text.removesuffix(held))
        self._text = rest + held
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "retry" and value.isascii() and value.isdigit():
            self.retry_s = int(value) / 1000
        elif name in ("event", "id", "data"):
            self._fields.setdefault(name, []).append(value)
        return None

    def _dispatch(self) -> Event | None:
        fields, self._fields = self._fields, {}
        if "data" not in fields or "event" not in fields:
            return None
        try:
            data = json.loads("\n".join(fields["data"]))
        except ValueError:
            return None
        ids = fields.get("id", [""])
        return Event(fields["event"][-1], data if isinstance(data, dict) else {}, ids[-1] or None)
