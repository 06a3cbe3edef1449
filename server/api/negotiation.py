"""Reads what a caller wants from its headers and body: Prefer, Accept, and strict JSON."""

import asyncio
import hashlib
import json
from dataclasses import dataclass
from email.message import Message
from typing import Any, NoReturn

from starlette.requests import Request

from server.api.schemas import printable
from server.errors import BodyTimeout, BodyTooLarge, InvalidRequest, MalformedBody, NotJson
from server.protocol import MEDIA_TYPES, OutputFormat
from server.queue.jobs import Idempotency

MAX_BODY_BYTES = 64 * 1024
BODY_TIMEOUT_S = 30.0
MAX_KEY_LENGTH = 255

_FORMAT_OF = {media: name for name, media in MEDIA_TYPES.items()}


@dataclass(frozen=True)
class Preference:
    """How long a caller waits: `wait_s`, and the header that says which wish was granted."""

    wait_s: float
    applied: str | None


def read_prefer(request: Request, longest_s: float) -> Preference:
    """Read the Prefer headers (RFC 7240): `respond-async`, `wait=N`; what is malformed is ignored.

    Together they mean: wait N seconds, then answer 202. Without either: wait `longest_s`.
    """
    wishes: dict[str, str] = {}
    for header in request.headers.getlist("prefer"):
        for part in header.split(","):
            name, _, value = part.split(";")[0].partition("=")
            wishes.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = wishes.get("wait", "")
    if wait.isascii() and wait.isdigit() and len(wait) <= 9:
        return Preference(min(float(wait), longest_s), f"wait={int(wait)}")
    if "respond-async" in wishes:
        return Preference(0.0, "respond-async")
    return Preference(longest_s, None)


def wanted_format(request: Request) -> OutputFormat | None:
    """The image format that the Accept header puts first, or None where JSON will do."""
    best: tuple[float, str] = (0.0, "")
    for header in request.headers.getlist("accept"):
        for part in header.split(","):
            media, *parameters = (piece.strip().lower() for piece in part.split(";"))
            if media not in _FORMAT_OF and media not in ("application/json", "*/*"):
                continue
            weight = _weight(parameters)
            if weight > best[0]:
                best = (weight, media)
    return _FORMAT_OF.get(best[1])


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return min(max(float(value), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def read_idempotency(request: Request, *asked: Any) -> Idempotency | None:
    """Read the Idempotency-Key header, with what it stands for: JSON values that say what was
    asked. Raises InvalidRequest."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise InvalidRequest(
            f"Idempotency-Key must have 1 to {MAX_KEY_LENGTH} printable characters, "
            f"got '{printable(key)}'"
        )
    meant = json.dumps(asked, sort_keys=True)
    return Idempotency(_sha256(key), _sha256(meant))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


async def read_json(request: Request) -> Any:
    """Read and decode the body; raises NotJson, BodyTooLarge, BodyTimeout or MalformedBody."""
    declared = Message()
    declared["content-type"] = request.headers.get("content-type", "")
    if not request.headers.get("content-type") or declared.get_content_type() != "application/json":
        shown = printable(request.headers.get("content-type", "")) or "nothing"
        raise NotJson(f"the content type must be application/json, got {shown}")
    return _decode(await _read_body(request))


async def _read_body(request: Request) -> bytes:
    too_large = f"the body must be at most {MAX_BODY_BYTES} bytes long"
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 12 or int(length) > MAX_BODY_BYTES):
        raise BodyTooLarge(too_large)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise BodyTooLarge(too_large)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    return bytes(body)


def _decode(body: bytes) -> Any:
    """Decode strict JSON: UTF-8, no NaN or Infinity, no name twice in one object."""
    try:
        return json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except UnicodeDecodeError:
        raise MalformedBody("the body is not UTF-8") from None
    except RecursionError:
        raise MalformedBody("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise MalformedBody(f"the body is not JSON: {error.msg} at {where}") from None
    except ValueError:  # an integer with more digits than Python converts
        raise MalformedBody("the body has a number with too many digits") from None


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBody(f"the body is not JSON: {name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise MalformedBody(f"the body gives '{printable(name)}' twice")
        found[name] = value
    return found
