"""Waking those who wait for a job: one subscription per process, whatever the number of waiters."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError, RedisError

from server.queue import keys
from server.queue.connection import end_tasks

if TYPE_CHECKING:
    from redis.asyncio import Redis

# A message lost with a connection costs a waiter at most this long.
POLL_S = 1.0

# A silent subscription is asked for a sign of life, and given up without one.
PING_S = 5.0
SILENCE_S = 12.0


class Changes:
    """One waiter's view: `next` returns when its job may have changed."""

    def __init__(self, timeout_s: float) -> None:
        self.changed = asyncio.Event()
        self._deadline = time.monotonic() + timeout_s

    async def next(self) -> bool:
        """Wait for a change or a second; False once the timeout is over."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(POLL_S, left_s)):
                await self.changed.wait()
        self.changed.clear()
        return True


class ChangeListener:
    """Listens to the channel of changed jobs while anybody waits, and survives Redis's absence."""

    def __init__(
        self, redis: "Redis", ping_s: float = PING_S, silence_s: float = SILENCE_S
    ) -> None:
        self._redis = redis
        self._ping_s, self._silence_s = ping_s, silence_s
        self._waiters: dict[str, set[Changes]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str, timeout_s: float) -> AsyncIterator[Changes]:
        """Collect the changes of a job from here on, for at most `timeout_s`."""
        changes = Changes(timeout_s)
        self._waiters[job_id].add(changes)
        if self._task is None:
            self._task = asyncio.create_task(self._listen())
        try:
            yield changes
        finally:
            self._waiters[job_id].discard(changes)
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            await end_tasks(self._task)
            self._task = None

    async def _listen(self) -> None:
        while True:
            try:
                await self._deliver()
            except (RedisError, OSError):
                await asyncio.sleep(POLL_S)

    async def _deliver(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(keys.CHANGES)
            self._wake_all()  # whatever happened before the subscription
            heard = asked = time.monotonic()
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=POLL_S)
                now = time.monotonic()
                if message is not None:
                    heard = asked = now
                    self._wake(message)
                elif now - heard > self._silence_s:
                    raise ConnectionError("the subscription is silent")
                elif now - asked > self._ping_s:
                    asked = now
                    await pubsub.ping()

    def _wake(self, message: dict[str, Any]) -> None:
        for changes in self._waiters.get(message["data"], ()):
            changes.changed.set()

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for changes in waiters:
                changes.changed.set()
