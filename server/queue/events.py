"""Waking those who wait for a job: one subscription per process, whatever the number of waiters."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from redis.exceptions import RedisError

from server.queue import keys
from server.queue.connection import end_tasks

if TYPE_CHECKING:
    from redis.asyncio import Redis

# A message lost with a connection costs a waiter at most this long.
POLL_S = 1.0


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
            await asyncio.wait_for(self.changed.wait(), min(POLL_S, left_s))
        self.changed.clear()
        return True


class ChangeListener:
    """Listens to the channel of changed jobs while anybody waits, and survives Redis's absence."""

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
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
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=POLL_S)
                if message is not None:
                    for changes in self._waiters.get(message["data"], ()):
                        changes.changed.set()

    def _wake_all(self) -> None:
        for waiters in self._waiters.values():
            for changes in waiters:
                changes.changed.set()
