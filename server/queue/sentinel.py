"""Finding the master that a group of sentinels agrees on."""

from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.sentinel import Sentinel

DEFAULT_PORT = 26379
FORM = "sentinel://[user:password@]host[:port][,host...]/master-name[/db]"


def connect_to_master(url: str, options: dict[str, Any]) -> Redis:
    """Return a client of the master that the sentinels of `url` name (see `connection.connect`).

    `options` are those of every connection. Raises ValueError for a URL of another form.
    """
    parts = urlsplit(url)
    login, _, hosts = parts.netloc.rpartition("@")
    name, _, db = parts.path.strip("/").partition("/")
    if not hosts or not name or not (db or "0").isdigit():
        raise ValueError(f"{parts.scheme}://{hosts}{parts.path} is not of the form {FORM}")
    both = options | _options(parts.query)
    if parts.scheme == "sentinels":
        both["ssl"] = True
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [_address(each) for each in hosts.split(",")], sentinel_kwargs=both, **both
    )
    user, _, password = login.partition(":")
    master: Redis = sentinel.master_for(
        name, db=int(db or 0), username=unquote(user) or None, password=unquote(password) or None
    )
    return master


async def close_sentinels(client: Redis) -> None:
    """Close what a client of a master asked the sentinels with; nothing for any other client."""
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager else ():
        await sentinel.aclose()


def _address(text: str) -> tuple[str, int]:
    host = urlsplit(f"//{text}")
    return host.hostname or "localhost", host.port or DEFAULT_PORT


def _options(query: str) -> dict[str, Any]:
    """The options behind a URL's `?`, as redis-py reads them."""
    given: dict[str, Any] = dict(parse_url(f"redis://localhost?{query}"))
    given.pop("host", None)
    return given
