"""Who calls: the API key of a request, what it may, and the headers that say what is left of it.

`authenticate` runs before every route. Where keys are required (see `create_app`), it lets nobody
pass without one, except to the open paths and to pictures whose URL is signed. Otherwise an
Authorization header is ignored, and everybody is the tenant `anonymous`.
"""

import re
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from server.api.context import ApiContext, context_of, promptly
from server.errors import MissingScope, QueueUnavailable, RateLimited, Unauthorized
from server.protocol import DEFAULT_TENANT, JobRecord
from server.queue.api_keys import SCOPES, ApiKey, Scope
from server.queue.jobs import TenantLimits

OPEN_PATHS = frozenset({"/", "/docs", "/livez", "/readyz", "/startupz"})
ADMIN_PREFIX = "/admin"
ANY_SCOPE = frozenset({"/metrics", "/usage"})

_IMAGE = re.compile(r"/jobs/[^/]+/images/[^/]+")
# Asking how things stand is free: a client that polls would have no requests left to submit.
_UNCOUNTED = re.compile(r"/jobs(/.*)?|/metrics|/state|/usage")


@dataclass(frozen=True)
class Caller:
    """Who sent a request. `key` is None where keys are not required.

    `signed` is for a request that was allowed by the signature of its URL: it has no tenant of its
    own and sees the job that its path names.
    """

    tenant: str
    scopes: frozenset[Scope]
    key: ApiKey | None = None
    signed: bool = False

    @property
    def limits(self) -> TenantLimits:
        """What a submission of this caller is held to."""
        return self.key.limits if self.key else TenantLimits()

    @property
    def key_hash(self) -> str:
        """Hash of the key whose secret signs this caller's webhooks, "" without a key."""
        return self.key.sha256 if self.key else ""

    def sees(self, record: JobRecord) -> bool:
        """Whether a job is this caller's; any other does not exist for it."""
        return self.signed or record.tenant == self.tenant


def caller(request: Request) -> Caller:
    """The caller of a request that has passed `authenticate`."""
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


async def authenticate(request: Request) -> None:
    """Find out who calls, for `caller`; a dependency of every route.

    Raises Unauthorized, MissingScope, RateLimited, or QueueUnavailable.
    """
    context = context_of(request)
    if not context.keys_required:
        # The owner of this machine may do everything; over a network nobody is known to be that.
        scopes = SCOPES if context.loopback_only else ("generate",)
        request.state.caller = Caller(DEFAULT_TENANT, frozenset(scopes))
    elif _path(request) in OPEN_PATHS:
        request.state.caller = Caller(DEFAULT_TENANT, frozenset())
        return
    else:
        request.state.caller = await _known(request, context)
    _check_scope(request, caller(request))


def _path(request: Request) -> str:
    """What the router matches. `request.url` is no guide: it is made with the Host header."""
    path: str = request.scope["path"]
    return path


async def _known(request: Request, context: ApiContext) -> Caller:
    path = _path(request)
    reads_image = request.method in ("GET", "HEAD") and _IMAGE.fullmatch(path)
    if reads_image and "signature" in request.query_params:
        if await promptly(context.image_links.hold(path, request.query_params)):
            return Caller(DEFAULT_TENANT, frozenset({"generate"}), signed=True)
        if "authorization" not in request.headers:
            raise Unauthorized("the signature of this URL is wrong or too old")
    key = await promptly(context.key_ring.find(_bearer(request)))
    if key is None:
        raise Unauthorized("the API key is unknown or was revoked")
    request.state.key_id = key.id
    await promptly(context.image_links.prepare())
    await _count(request, context, key)
    return Caller(key.tenant, frozenset(key.scopes), key)


def _bearer(request: Request) -> str:
    """The key in the Authorization header; raises Unauthorized where there is none."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise Unauthorized("send your API key as 'Authorization: Bearer KEY'")
    return text.strip()


async def _count(request: Request, context: ApiContext, key: ApiKey) -> None:
    """Count a request against the key's rate; the answer's headers then say what is left."""
    counted = not _UNCOUNTED.fullmatch(_path(request))
    if counted or _path(request) == "/usage":
        request.state.answer_headers = partial(_standing, context, key)
    if counted and not await promptly(context.rates.hit(key)):
        rate = await promptly(context.rates.requests(key))
        sentence = f"this API key has sent {key.rate} requests within a minute, its limit"
        raise RateLimited(sentence, rate.reset_s if rate else None)


async def _standing(context: ApiContext, key: ApiKey) -> dict[str, str]:
    """The RateLimit fields; none where Redis does not tell, since the answer itself is ready."""
    try:
        return await promptly(context.rates.headers(key))
    except QueueUnavailable:
        return {}


def _check_scope(request: Request, who: Caller) -> None:
    path = _path(request)
    needed: Scope = "admin" if path.startswith(ADMIN_PREFIX) else "generate"
    if path in OPEN_PATHS or path in ANY_SCOPE or needed in who.scopes:
        return
    if who.key is None:
        raise MissingScope(
            "this needs an API key of scope 'admin', and the service runs without keys; "
            "use `lumina dead` on its machine"
        )
    raise MissingScope(f"this needs an API key of scope '{needed}'")
