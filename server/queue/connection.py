"""How the service talks to Redis: one way to connect, one way to run scripts, one error."""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from server import metrics
from server.errors import QueueUnavailable
from server.queue import keys
from server.queue.sentinel import close_sentinels, connect_to_master

# Nothing waits longer for Redis, whatever happens to the connection.
ANSWER_S = 5.0
SOCKET_TIMEOUT_S = 4.0

# The longest blocking read; it must stay below the socket timeout, or an idle worker's wait
# looks like a dead server.
MAX_BLOCK_S = 2.0

SCRIPT_NAMES = (
    "submit", "claim", "heartbeat", "progress", "complete", "fail", "release", "cancel", "reap",
    "retry", "purge", "reconcile", "epoch", "offer", "preview", "outbox", "delivered",
    "record", "erase", "load",
)  # fmt: skip


def connect(url: str) -> Redis:
    """Return a client for `redis://`, `rediss://` (TLS), `unix://` or Sentinel; sends nothing yet.

    `sentinel://[user:password@]host[:26379][,host...]/name[/db]` asks the sentinels for the master
    called `name`, again after every lost connection; `sentinels://` does so over TLS, to both. User
    and password are those of the master. Options behind `?` are redis-py's, such as `ssl_ca_certs`.

    The client does not retry by itself: its default of ten retries turns a lost server into a
    minute of silence. Callers decide what is safe to repeat. Raises ValueError for any other URL.
    """
    options: dict[str, Any] = {
        "decode_responses": True,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    if url.startswith(("sentinel:", "sentinels:")):
        return connect_to_master(url, options)
    client: Redis = Redis.from_url(url, **options)
    return client


def load_scripts(redis: Redis) -> dict[str, Any]:
    """Return every script by name, ready to call; a script Redis has forgotten is sent again.

    Each answers with what its file returns and with what it tells the metrics (common.lua).
    """
    folder = resources.files("server.queue") / "scripts"
    common = keys.lua_prelude() + (folder / "common.lua").read_text()

    return {
        name: redis.register_script(script_text(common, (folder / f"{name}.lua").read_text()))
        for name in SCRIPT_NAMES
    }


def script_text(common: str, body: str) -> str:
    """Lua that answers with what `body` returns and with what it tells the metrics."""
    answer = "local answer = script()\nif answer == nil then answer = false end\n"
    return f"{common}\nlocal function script()\n{body}\nend\n{answer}return {{answer, told}}\n"


_TOLD = {
    "submitted": metrics.jobs_submitted,
    "finished": metrics.jobs_finished,
    "reclaimed": metrics.jobs_reclaimed,
    "fenced": metrics.fenced_writes,
}


def answer_of(reply: Any) -> Any:
    """Return a script's own answer, and count what it tells."""
    answer, told = reply
    for what, pool, *more in told:
        _TOLD[what].labels(pool, *more).inc()
    return answer


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


class LastAnswer:
    """When Redis last answered anybody in this process: a slow answer among others tells of a busy
    process, silence for all of a Redis that is away."""

    def __init__(self) -> None:
        self._at = float("-inf")

    def note(self) -> None:
        """Say that an answer came just now."""
        self._at = time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last answer; infinite before the first."""
        return time.monotonic() - self._at


last_answer = LastAnswer()


async def guarded(call: Awaitable[Any]) -> Any:
    """Await a Redis call; whatever Redis or the network raises becomes QueueUnavailable.

    So does silence of ANSWER_S. The call runs in a task of its own, so that a cancellation of the
    caller gets through even where redis-py swallows it (see `end_tasks`).
    """

    async def answer() -> Any:
        return await call

    task = asyncio.create_task(answer())
    try:
        await asyncio.wait({task}, timeout=ANSWER_S)
        if not task.done():
            raise QueueUnavailable(f"the job queue does not answer within {ANSWER_S:g} s")
        result = task.result()
        last_answer.note()
        return result
    except (RedisError, OSError) as error:
        raise QueueUnavailable(f"the job queue does not answer: {error}") from error
    finally:
        await end_tasks(task)


def _close_unstarted(call: Awaitable[Any]) -> None:
    """Close a coroutine that was given up before it began, or Python warns nobody awaited it."""
    if inspect.iscoroutine(call) and inspect.getcoroutinestate(call) == inspect.CORO_CREATED:
        call.close()


def _kind_of(cause: BaseException | None) -> str:
    if isinstance(cause, ResponseError):
        return "refused"
    silent = cause is None or isinstance(cause, (RedisTimeout, TimeoutError))
    return "silent" if silent else "unreachable"


class RedisLine:
    """The connections of one event loop, and the scripts over them.

    Args:
        redis: a client with decoded responses (`connect`).
        clock_ms: the time in ms instead of Redis's own; for tests.
    """

    def __init__(self, redis: Redis, clock_ms: Callable[[], int] | None = None) -> None:
        self.redis = redis
        self._clock_ms = clock_ms
        self._scripts = load_scripts(redis)
        self._hanging_up: set[asyncio.Task[None]] = set()

    async def ask(self, call: Awaitable[Any]) -> Any:
        """Await a Redis call; raises QueueUnavailable.

        After a call that met silence or was given up, idle connections are closed: when one is
        half open, the others are too, and each would cost a caller its own wait.
        """
        try:
            if self._hanging_up:
                await asyncio.wait(set(self._hanging_up))
            return await guarded(call)
        except asyncio.CancelledError:
            _close_unstarted(call)
            self._hang_up()
            raise
        except QueueUnavailable as error:
            metrics.redis_errors.labels(_kind_of(error.__cause__)).inc()
            if not isinstance(error.__cause__, ResponseError):
                self._hang_up()
            raise

    async def run(self, name: str, *args: str | int | bytes) -> Any:
        """Run a script. The key names the shard; the scripts derive the rest from the prefix."""
        with metrics.redis_script.labels(name).time():
            call = self._scripts[name](keys=[keys.SEQ], args=[self._now(), *args])
            return answer_of(await self.ask(call))

    async def preload(self) -> None:
        """Send all scripts: a call that finds its own missing takes three round trips."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for script in self._scripts.values():
                pipe.script_load(script.script)
            await self.ask(pipe.execute())

    async def run_all(self, name: str, calls: Sequence[Sequence[str | int]]) -> list[Any]:
        """Run a script once per element of `calls`, all in one round trip."""
        now = self._now()
        async with self.redis.pipeline(transaction=False) as pipe:
            for args in calls:
                await self._scripts[name](keys=[keys.SEQ], args=[now, *args], client=pipe)
            return [answer_of(reply) for reply in await self.ask(pipe.execute())]

    async def close(self) -> None:
        """Close the connections."""
        await end_tasks(*self._hanging_up)
        await self.redis.aclose()
        await close_sentinels(self.redis)

    def _now(self) -> int:
        return self._clock_ms() if self._clock_ms else 0

    def _hang_up(self) -> None:
        async def disconnect() -> None:
            with contextlib.suppress(RedisError, OSError):
                await self.redis.connection_pool.disconnect(inuse_connections=False)

        task = asyncio.create_task(disconnect())
        self._hanging_up.add(task)
        task.add_done_callback(self._hanging_up.discard)
