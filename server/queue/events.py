"""What happened to a job, and waking those who wait for it.

Every transition appends an event to the job's stream and publishes the job's id. One subscription
per process wakes the waiters, whatever their number; they read the stream.
"""

import asyncio
import contextlib
import re
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import ConnectionError, RedisError

from server.errors import InvalidRequest, NotFound
from server.protocol import TERMINAL_STATUSES
from server.queue import keys
from server.queue.connection import RedisLine, end_tasks

if TYPE_CHECKING:
    from redis.asyncio import Redis

# A message lost with a connection costs a waiter at most this long.
POLL_S = 1.0

EVENT_ID = re.compile(r"\d{1,16}-\d{1,10}")
FROM_THE_START = "0-0"
PAGE = 100

# A silent subscription is asked for a sign of life, and given up without one.
PING_S = 5.0
SILENCE_S = 12.0


class Changes:
    """One waiter's view: `next` returns when its job may have changed.

    Who wants `pictures` is woken by new ones too; their names gather in `names`, and `moved` says
    whether there may be new events as well.
    """

    def __init__(self, timeout_s: float, poll_s: float = POLL_S, *, pictures: bool = False) -> None:
        self.changed = asyncio.Event()
        self.moved = True
        self.names: set[str] = set()
        self._pictures = pictures
        self._poll_s = poll_s
        self._deadline = time.monotonic() + timeout_s

    def tell(self, picture: str = "") -> None:
        """Wake the waiter: a picture of that name came, or (without one) something happened."""
        if picture and not self._pictures:
            return
        if picture:
            self.names.add(picture)
        else:
            self.moved = True
        self.changed.set()

    async def next(self) -> bool:
        """Wait for a change or `poll_s`; False once the timeout is over."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            return False
        try:
            async with asyncio.timeout(min(self._poll_s, left_s)):
                await self.changed.wait()
        except TimeoutError:
            self.moved = True  # a message may have been lost
        self.changed.clear()
        return True


class ChangeListener:
    """Listens to the channel of changed jobs while anybody waits, and survives Redis's absence.

    `poll_s` is how long a waiter trusts that a message would have come. `heard` counts messages.
    """

    def __init__(
        self, redis: "Redis", ping_s: float = PING_S, silence_s: float = SILENCE_S
    ) -> None:
        self.poll_s = POLL_S
        self.heard = 0
        self._redis = redis
        self._ping_s, self._silence_s = ping_s, silence_s
        self._waiters: dict[str, set[Changes]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(
        self, job_id: str, timeout_s: float, *, pictures: bool = False
    ) -> AsyncIterator[Changes]:
        """Collect the changes of a job from here on, for at most `timeout_s`."""
        changes = Changes(timeout_s, self.poll_s, pictures=pictures)
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
        job_id, _, picture = message["data"].partition(":")
        self.heard += 1
        for changes in self._waiters.get(job_id, ()):
            changes.tell(picture)

    def _wake_all(self) -> None:
        self.heard += 1
        for waiters in self._waiters.values():
            for changes in waiters:
                changes.tell()


@dataclass(frozen=True)
class JobEvent:
    """One thing that happened to a job.

    `id` grows, and continues the story in `EventStream.follow`. `type` is `queued`, `started` (with
    `attempt`), `progress` (with `step` and `total`) or the terminal status.
    """

    id: str
    type: str
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.type in TERMINAL_STATUSES


@dataclass(frozen=True)
class NewPicture:
    """An unfinished picture of a running job is there to read: its latest preview, or the partial
    picture `number` of its picture `image`."""

    image: int | None = None
    number: int | None = None


def _picture_of(name: str) -> NewPicture:
    """Read what the preview script says of a picture: `preview` or `preview:<image>:<number>`."""
    _, *numbers = name.split(":")
    return NewPicture(*map(int, numbers))


class EventStream(RedisLine):
    """The events of every job, in their order. Raises QueueUnavailable when Redis is away."""

    def __init__(self, redis: "Redis", clock_ms: Callable[[], int] | None = None) -> None:
        super().__init__(redis, clock_ms)
        self._changes = ChangeListener(redis)
        self._reading: dict[tuple[str, str, int], asyncio.Task[list[JobEvent]]] = {}

    async def close(self) -> None:
        """Stop listening and close the connections."""
        await self._changes.close()
        await end_tasks(*self._reading.values())
        await super().close()

    async def events(self, job_id: str, after: str = FROM_THE_START) -> list[JobEvent]:
        """Return the next events behind `after`, up to a page of them.

        Raises InvalidRequest for what is no event id.
        """
        if not EVENT_ID.fullmatch(after):
            raise InvalidRequest(f"an event id looks like 1700000000000-0, got {after[:40]!r}")
        found = await self.ask(self.redis.xrange(keys.events(job_id), f"({after}", "+", PAGE))
        return [JobEvent(at, fields.pop("type"), fields) for at, fields in found]

    def follow(
        self, job_id: str, after: str = FROM_THE_START, beat_s: float = 15.0
    ) -> AsyncGenerator[JobEvent | None, None]:
        """Yield every event behind `after` as it happens, up to the last; None after each `beat_s`
        without any.

        Every process reads the same stream, so a story goes on in another one without a gap or a
        repeat. An hour after the job's end only its last event is left to tell. Raises NotFound for
        an unknown job.
        """
        told = self._follow(job_id, after, beat_s, pictures=False)
        return cast(AsyncGenerator[JobEvent | None, None], told)

    def look_on(
        self, job_id: str, after: str = FROM_THE_START, beat_s: float = 15.0
    ) -> AsyncGenerator[JobEvent | NewPicture | None, None]:
        """As `follow`, and say of every new preview and partial picture, before what comes behind
        it. Messages may be lost with a connection: pictures are for those who look, when they do.
        """
        return self._follow(job_id, after, beat_s, pictures=True)

    async def _follow(
        self, job_id: str, after: str, beat_s: float, *, pictures: bool
    ) -> AsyncGenerator[JobEvent | NewPicture | None, None]:
        async with self._changes.watch(job_id, float("inf"), pictures=pictures) as changes:
            told = time.monotonic()
            while True:
                names, changes.names = changes.names, set()
                for name in sorted(names):
                    yield _picture_of(name)
                if changes.moved:
                    changes.moved = False
                    page = await self._read_together(job_id, after)
                    for event in page:
                        yield event
                        after, told = event.id, time.monotonic()
                        if event.last:
                            return
                    if len(page) == PAGE:
                        changes.moved = True
                        continue
                    if not page:
                        end = await self._end(job_id)
                        if end is not None and not await self.events(job_id, after):
                            if end.id > after and not await self.ask(
                                self.redis.exists(keys.events(job_id))
                            ):
                                yield end
                            return
                if time.monotonic() - told >= beat_s:
                    yield None
                    told = time.monotonic()
                await changes.next()

    async def _read_together(self, job_id: str, after: str) -> list[JobEvent]:
        """`events`, asked once for all who were woken by the same message and are equally far."""
        key = (job_id, after, self._changes.heard)
        reading = self._reading.get(key)
        if reading is None:
            reading = asyncio.create_task(self.events(job_id, after))
            self._reading[key] = reading
            reading.add_done_callback(lambda _: self._reading.pop(key, None))
        return await asyncio.shield(reading)

    async def _end(self, job_id: str) -> JobEvent | None:
        """The last event of a job that has ended, from its record."""
        status, at_ms = await self.ask(self.redis.hmget(keys.job(job_id), "status", "finished_ms"))
        if status is None:
            raise NotFound(f"there is no job {job_id}")
        return JobEvent(f"{at_ms}-0", status) if status in TERMINAL_STATUSES else None
