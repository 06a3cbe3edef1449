"""`lumina keys`: making, listing and revoking API keys, before or while a service runs."""

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from server.errors import InvalidRequest
from server.misuse import MisuseError
from server.operate import RedisUrl

if TYPE_CHECKING:
    from server.queue.api_keys import ApiKey
    from server.queue.jobs import JobQueue

T = TypeVar("T")

keys_app = typer.Typer(help="API keys.", no_args_is_help=True)

DataDir = Annotated[
    Path | None,
    typer.Option(help="Data directory of `lumina serve`, running or not.", show_default=False),
]


def _on_queue(
    redis_url: str | None,
    data_dir: Path | None,
    act: "Callable[[JobQueue], Awaitable[T]]",
    *,
    may_begin: bool = False,
) -> T:
    """What `act` returns of the queue; `may_begin` makes a data directory that is not there yet."""
    from server.config import load_settings
    from server.queue.jobs import open_queue

    settings = load_settings(redis_url=redis_url, data_dir=data_dir)
    if redis_url and data_dir:
        raise MisuseError("give either --redis-url or --data-dir")
    by_url = bool(redis_url) or (data_dir is None and "redis_url" in settings.model_fields_set)
    if not by_url and "data_dir" not in settings.model_fields_set:
        raise MisuseError("give --data-dir (of `lumina serve`) or --redis-url")
    if not by_url and not may_begin and not settings.data_dir.is_dir():
        raise MisuseError(f"--data-dir {settings.data_dir}: there is no such folder")

    async def main() -> T:
        queue = open_queue(settings)
        try:
            return await act(queue)
        finally:
            await queue.close()

    with ExitStack() as stack:
        if not by_url:
            from server.embedded.data_dir import borrowed_redis

            url = stack.enter_context(borrowed_redis(settings.data_dir))
            settings = settings.model_copy(update={"redis_url": url})
        return asyncio.run(main())


def _line(key: "ApiKey") -> str:
    made = datetime.fromtimestamp(key.created_ms / 1000, UTC).isoformat(timespec="seconds")
    limits = {
        "rate": key.rate,
        "concurrency": key.open_jobs,
        "daily": key.daily_jobs,
        "weight": key.weight,
    }
    told = " ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
    words = (key.id, made.replace("+00:00", "Z"), key.tenant, ",".join(key.scopes), told, key.name)
    return "  ".join(word for word in words if word)


Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", help="generate or admin; twice for both.", show_default="generate"),
]
PerMinute = Annotated[
    int | None, typer.Option(min=1, help="Requests a minute.", show_default="no limit")
]
OpenJobs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Jobs of the tenant that have not ended.", show_default="LUMINA_TENANT_LIMIT"
    ),
]
DailyJobs = Annotated[
    int | None,
    typer.Option(min=1, help="Jobs of the tenant on a UTC day.", show_default="no limit"),
]
GivenBy = Annotated[
    str,
    typer.Option(
        metavar="VARIABLE",
        help="Take the key from this environment variable; made anew if it exists.",
        show_default="drawn",
    ),
]


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="A note for you.", show_default=False)] = "",
    tenant: Annotated[
        str, typer.Option(help="Whose jobs it submits and sees.", show_default="one of its own")
    ] = "",
    scope: Scopes = None,
    rate: PerMinute = None,
    concurrency: OpenJobs = None,
    daily: DailyJobs = None,
    weight: Annotated[int, typer.Option(min=1, help="Share beside tenants of weight 1.")] = 1,
    webhook_secret: Annotated[
        str, typer.Option(help="Signs webhooks: whsec_ and base64.", show_default="drawn")
    ] = "",
    from_env: GivenBy = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> int:
    """Make a key and print it, this once. What else there is to know goes to stderr."""

    async def act(queue: "JobQueue") -> "tuple[ApiKey, str, ApiKey | None]":
        from server.queue.api_keys import KeyRing

        ring = KeyRing(queue)
        before = await ring.find(given)
        made = await ring.create(
            tenant=tenant,
            name=name,
            scopes=tuple(scope or ("generate",)),  # type: ignore[arg-type]
            rate=rate,
            open_jobs=concurrency,
            daily_jobs=daily,
            weight=weight,
            webhook_secret=webhook_secret,
            text=given,
        )
        return (*made, before)

    given = os.environ.get(from_env, "").strip() if from_env else ""
    if from_env and not given:
        raise typer.BadParameter(f"--from-env: {from_env} is not set")
    try:
        key, text, before = _on_queue(redis_url, data_dir, act, may_begin=True)
    except InvalidRequest as error:
        raise typer.BadParameter(error.detail) from None
    if as_json:
        print(json.dumps({"key": text, "id": key.id} | dataclasses.asdict(key)))
        return 0
    _tell(key, before, "" if given else text)
    return 0


def _tell(key: "ApiKey", before: "ApiKey | None", text: str) -> None:
    """Print a new key's text, if it was drawn; to stderr what else there is to know, once."""
    if text:
        print(text)
    print(_line(key), file=sys.stderr)
    if before is None or before.webhook_secret != key.webhook_secret:
        print(f"webhook secret  {key.webhook_secret}", file=sys.stderr)
        print("Neither is shown again." if text else "It is not shown again.", file=sys.stderr)


@keys_app.command("list")
def list_keys(redis_url: RedisUrl = None, data_dir: DataDir = None) -> int:
    """List keys, the oldest first: id, when made, tenant, scopes, limits, name."""

    async def act(queue: "JobQueue") -> "list[ApiKey]":
        from server.queue.api_keys import KeyRing

        return await KeyRing(queue).all()

    for key in _on_queue(redis_url, data_dir, act):
        print(_line(key))
    return 0


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `list` shows it.")],
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
) -> int:
    """Revoke a key at once. Its jobs go on; their webhooks are no longer sent."""

    async def act(queue: "JobQueue") -> "ApiKey | None":
        from server.queue.api_keys import KeyRing

        return await KeyRing(queue).revoke(key_id)

    if _on_queue(redis_url, data_dir, act) is None:
        raise ValueError(f"there is no API key with the id {key_id!r}")
    print(f"{key_id}  revoked")
    return 0


@keys_app.command("webhook-secret")
def show_webhook_secret(redis_url: RedisUrl = None, data_dir: DataDir = None) -> int:
    """Print what signs the webhooks of callers without a key, unless LUMINA_WEBHOOK_SECRET does."""

    async def act(queue: "JobQueue") -> str:
        from server.queue.api_keys import anonymous_webhook_secret

        return await anonymous_webhook_secret(queue)

    print(_on_queue(redis_url, data_dir, act, may_begin=True))
    return 0
