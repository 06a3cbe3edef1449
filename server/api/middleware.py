"""What surrounds every request: its id, the Host check, and the last net for exceptions."""

import re
import secrets
import time
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.api.address import is_loopback
from server.api.problems import error_problem, problem
from server.api.schemas import printable
from server.errors import ForeignHost, ForeignOrigin

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_CLOSED = 499  # counted and logged where the client left before there was an answer
PROBES = frozenset({"/livez", "/readyz", "/startupz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

log = structlog.get_logger(__name__)


def host_name(header: str) -> str:
    """The name of a Host header without its port, lower-cased; empty where it has none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def note_route(request: Request) -> None:
    """Tell the guard, which only sees the path, which route serves; a dependency of all."""
    request.state.route = getattr(request.scope.get("route"), "path", "other")


def _count(scope: Scope, status: int, took_s: float) -> None:
    """Count a request under its route's pattern: paths, and methods of one's own, have no end."""
    route = scope["state"].get("route", "other")
    method = scope["method"] if scope["method"] in METHODS else "other"
    code = str(status or CLIENT_CLOSED)
    metrics.http_requests.labels(route, method, code).inc()
    metrics.http_request_duration.labels(route, method, code).observe(took_s)


class RequestGuard:
    """ASGI middleware that gives each request an id and never lets an exception out.

    With `loopback_only`, a request whose Host header is no loopback name is refused: a foreign web
    page that points its own name at this machine cannot drive the service. Nor can one that sends
    forms to this machine's own name: a change must come from a loopback page, or from no page.
    """

    def __init__(self, app: ASGIApp, loopback_only: bool) -> None:
        self._app = app
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; anything but HTTP passes through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = request_id
                if "answer_headers" in state:  # see server.api.auth
                    answer.update(await state["answer_headers"]())
            await send(message)

        started = time.monotonic()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._answer(scope, receive, send_with_id, headers)
            except ClientDisconnect:
                log.info("client left before its request was complete")
            except Exception:
                log.exception("unexpected error", path=scope["path"])
                if status:
                    raise  # half an answer is out: only closing the connection is honest
                detail = f"Something went wrong here; the log has it under {request_id}."
                await problem(scope, 500, "internal", detail)(scope, receive, send_with_id)
            took_s = time.monotonic() - started
            _count(scope, status, took_s)
            say = log.debug if scope["path"] in PROBES else log.info  # they come twice a second
            say(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                key=state.get("key_id"),
                duration_ms=round(took_s * 1000),
            )

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        error = self._foreign(scope["method"], headers) if self._loopback_only else None
        if error is not None:
            await error_problem(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _foreign(self, method: str, headers: Headers) -> ForeignHost | ForeignOrigin | None:
        allowed = "localhost or a loopback address such as 127.0.0.1"
        host = headers.get("host", "")
        if not is_loopback(host_name(host)):
            return ForeignHost(f"the Host header must name {allowed}, got '{printable(host)}'")
        origin = headers.get("origin")
        if method in SAFE_METHODS or origin is None:
            return None
        if not is_loopback(host_name(origin.partition("://")[2])):
            return ForeignOrigin(f"the Origin must be {allowed}, got '{printable(origin)}'")
        return None


class WholeAnswers:
    """ASGI middleware that ignores Range headers, as a server may: what is served is small, and
    Starlette would answer malformed ones in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on without its Range header."""
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name != b"range"]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)
