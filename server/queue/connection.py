"""How the service talks to Redis: one way to connect, one way to run scripts, one error."""

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from server.errors import QueueUnavailable
from server.queue import keys

SOCKET_TIMEOUT_S = 5.0

# The longest blocking read; it must stay below the socket timeout, or an idle worker's wait
# looks like a dead server.
MAX_BLOCK_S = 2.0

SCRIPT_NAMES = (
    "submit", "claim", "heartbeat", "progress", "complete", "fail", "release", "cancel", "reap",
)  # fmt: skip

Script = Callable[..., Awaitable[Any]]


def connect(url: str) -> Redis:
    """Return a client for `redis://`, `rediss://` or `unix://`; nothing is sent yet.

    The client does not retry by itself: its default of ten retries turns a lost server into a
    minute of silence. Callers decide what is safe to repeat.
    """
    client: Redis = Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    return client


def load_scripts(redis: Redis) -> dict[str, Script]:
    """Return every script by name, ready to call; a script Redis has forgotten is sent again."""
    folder = resources.files("server.queue") / "scripts"
    common = keys.lua_prelude() + (folder / "common.lua").read_text()
    return {
        name: redis.register_script(common + (folder / f"{name}.lua").read_text())
        for name in SCRIPT_NAMES
    }


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks that use Redis and wait until they have ended.

    One cancellation is not enough: up to Python 3.11 `asyncio.wait_for`, which redis-py uses,
    swallows one that arrives together with the answer.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=0.1)
        for task in ended:
            if not task.cancelled():
                task.exception()  # marks it as seen


async def guarded(call: Awaitable[Any]) -> Any:
    """Await a Redis call; whatever Redis or the network raises becomes QueueUnavailable."""
    try:
        return await call
    except (RedisError, OSError) as error:
        raise QueueUnavailable(f"the job queue does not answer: {error}") from error
