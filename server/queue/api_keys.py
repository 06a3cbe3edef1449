"""KeyRing: API keys, what each may, and finding one by its text.

A key is a prefix and 256 random bits. Only its SHA-256 is kept: a copy of Redis opens nothing. A
hash without salt is enough, since nobody can guess 256 bits.
"""

import base64
import dataclasses
import hashlib
import hmac
import json
import re
import secrets
from typing import Literal, get_args

from pydantic import TypeAdapter

from server.config import SECRET_PREFIX, check_webhook_secret
from server.errors import InvalidRequest
from server.protocol import is_name
from server.queue import keys
from server.queue.connection import RedisLine
from server.queue.submission import TenantLimits

Scope = Literal["generate", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

KEY_PREFIX = "lumina_"
RANDOM_BYTES = 32
ID_LENGTH = 12
MAX_WEIGHT = 1000
MAX_NAME = 100

_KEY = re.compile(KEY_PREFIX + r"[A-Za-z0-9_-]{43}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of a key, and what its bearer may; None means no limit of its own.

    `rate` is requests a minute of this key. `open_jobs` and `daily_jobs` bound what its tenant has,
    whichever key submitted it; `weight` is the tenant's share beside others. Times are ms.
    """

    sha256: str
    tenant: str
    name: str = ""
    scopes: tuple[Scope, ...] = ("generate",)
    rate: int | None = None
    open_jobs: int | None = None
    daily_jobs: int | None = None
    weight: int = 1
    webhook_secret: str = ""
    created_ms: int = 0

    @property
    def id(self) -> str:
        """Names the key without opening anything."""
        return self.sha256[:ID_LENGTH]

    @property
    def limits(self) -> TenantLimits:
        """What a submission is held to."""
        return TenantLimits(self.open_jobs, self.daily_jobs, self.weight)


_READ = TypeAdapter(ApiKey)


def new_webhook_secret() -> str:
    """Return a fresh secret in the form of Standard Webhooks."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(RANDOM_BYTES)).decode()


async def anonymous_webhook_secret(line: RedisLine) -> str:
    """The secret that signs webhooks of callers without a key; the first to ask draws it.

    Raises QueueUnavailable.
    """
    await line.ask(line.redis.set(keys.WEBHOOK_SECRET, new_webhook_secret(), nx=True))
    secret: str = await line.ask(line.redis.get(keys.WEBHOOK_SECRET))
    return secret


class KeyRing:
    """The keys in one Redis. All methods raise QueueUnavailable when Redis does not answer."""

    def __init__(self, line: RedisLine) -> None:
        self._line = line

    async def create(
        self,
        *,
        tenant: str = "",
        name: str = "",
        scopes: tuple[Scope, ...] = ("generate",),
        rate: int | None = None,
        open_jobs: int | None = None,
        daily_jobs: int | None = None,
        weight: int = 1,
        webhook_secret: str = "",
        text: str = "",
    ) -> tuple[ApiKey, str]:
        """Make a key (see ApiKey); returns it and its text, which nobody can find out again.

        Without `tenant` it gets one of its own, without `text` one that is drawn. The key of a
        `text` that exists already is made anew, with the webhook secret it had unless another is
        given: its receivers verify with that. Raises InvalidRequest (a ValueError) for values
        that are not allowed.
        """
        text = text or KEY_PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
        if not _KEY.fullmatch(text):  # the text itself must not reach a log
            raise InvalidRequest(f"an API key must be {KEY_PREFIX} and 256 bits in URL-safe base64")
        sha256 = _sha256(text)
        known = await self.get(sha256)
        webhook_secret = webhook_secret or (known.webhook_secret if known else "")
        seconds, _ = await self._line.ask(self._line.redis.time())
        key = ApiKey(
            sha256=sha256,
            tenant=tenant or f"key-{sha256[:ID_LENGTH]}",
            name=name,
            scopes=tuple(sorted(set(scopes))),
            rate=rate,
            open_jobs=open_jobs,
            daily_jobs=daily_jobs,
            weight=weight,
            webhook_secret=webhook_secret or new_webhook_secret(),
            created_ms=seconds * keys.SECOND_MS,
        )
        _check(key)
        async with self._line.redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.api_key(sha256), mapping={"info": json.dumps(dataclasses.asdict(key))})
            pipe.zadd(keys.API_KEYS, {sha256: key.created_ms})
            await self._line.ask(pipe.execute())
        return key, text

    async def find(self, text: str) -> ApiKey | None:
        """Return the key with this text, None if there is none (any more)."""
        if not _KEY.fullmatch(text):
            return None
        return await self.get(_sha256(text))

    async def get(self, sha256: str) -> ApiKey | None:
        """Return the key whose text has this hash, None if there is none (any more)."""
        info = await self._line.ask(self._line.redis.hget(keys.api_key(sha256), "info"))
        key = None if info is None else _READ.validate_json(info)
        return key if key and hmac.compare_digest(key.sha256, sha256) else None

    async def all(self) -> list[ApiKey]:
        """Return every key, the oldest first."""
        hashes = await self._line.ask(self._line.redis.zrange(keys.API_KEYS, 0, -1))
        found = [await self.get(sha256) for sha256 in hashes]
        return [key for key in found if key is not None]

    async def revoke(self, key_id: str) -> ApiKey | None:
        """Forget the key with this id; returns it, None if there is none.

        It opens nothing from this moment on. Jobs it has submitted go on.
        """
        for key in await self.all():
            if key.id == key_id:
                async with self._line.redis.pipeline(transaction=True) as pipe:
                    pipe.delete(keys.api_key(key.sha256))
                    pipe.zrem(keys.API_KEYS, key.sha256)
                    await self._line.ask(pipe.execute())
                return key
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check(key: ApiKey) -> None:
    if not is_name(key.tenant):
        allowed = "1 to 64 letters, digits, dots, dashes and underscores"
        raise InvalidRequest(f"tenant must be {allowed}, got {key.tenant!r}")
    if len(key.name) > MAX_NAME or not key.name.isprintable():
        raise InvalidRequest(f"name must have at most {MAX_NAME} printable characters")
    if not key.scopes or not set(key.scopes) <= set(SCOPES):
        raise InvalidRequest(f"scopes must be among {', '.join(SCOPES)}, got {key.scopes}")
    for field in ("rate", "open_jobs", "daily_jobs"):
        value = getattr(key, field)
        if value is not None and value < 1:
            raise InvalidRequest(f"{field} must be at least 1, got {value}")
    if not 1 <= key.weight <= MAX_WEIGHT:
        raise InvalidRequest(f"weight must be from 1 to {MAX_WEIGHT}, got {key.weight}")
    try:
        check_webhook_secret(key.webhook_secret)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
