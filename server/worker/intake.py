"""The worker's line to the queue: a thread with its own event loop.

It claims what the scheduler has room for, renews leases, learns of cancellations, reports progress
and commits results. The engine's thread only exchanges small messages with it, so a slow Redis
never holds up a denoising step, and a long step never costs a lease.
"""

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from server import metrics
from server.errors import QueueUnavailable
from server.protocol import JobError, JobResult, ModelInfo
from server.queue.connection import MAX_BLOCK_S, end_tasks
from server.queue.jobs import Claim, JobQueue
from server.queue.upkeep import Upkeep
from server.scheduler.scheduler import Capacity
from server.worker.pulse import Pulse

log = structlog.get_logger(__name__)
T = TypeVar("T")

RETRY_S = (0.2, 2.0)
BUSY_CLAIM_S = 0.05
LOOK_S = 0.05  # how soon a cancellation is heard of
PROGRESS_S = 0.25  # how often the progress of one job is told
AWAY_S = 10.0  # without an answer of the queue for so long, a worker is not ready
STORE_S = 120.0  # a job that is being stored for longer hangs in the blob store


@dataclass(frozen=True)
class Arrival:
    """A claimed job, and the monotonic time it was claimed at."""

    claim: Claim
    claimed_at: float


@dataclass(frozen=True)
class Inbox:
    """What happened since the last poll: jobs to start, and keys of claims to drop."""

    arrivals: list[Arrival]
    dropped: list[str]


class Intake:
    """The queue as the engine's thread sees it.

    Args:
        open_queue: makes the JobQueue, which only the intake's own event loop uses.
        worker_id: names this worker in leases.
        pool: whose jobs to claim.
        pulse: beaten by the engine; when it stops, leases are no longer renewed.
        store_s: how long a job may be on its way into the blob store before it is let go.
    """

    def __init__(
        self,
        open_queue: Callable[[], JobQueue],
        worker_id: str,
        pool: str,
        pulse: Pulse,
        store_s: float = STORE_S,
    ) -> None:
        self.worker_id = worker_id
        self.pool = pool
        self._open_queue = open_queue
        self._pulse = pulse
        self._store_s = store_s
        self._last_claim = metrics.worker_last_claim.labels(pool, worker_id)
        self._held: dict[str, Claim] = {}
        self._steps: dict[str, tuple[int, int]] = {}
        self._told_at: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self._storing: dict[str, float] = {}
        self._looked_at = self._answered_at = time.monotonic()
        self._waiting_seen_at = 0.0
        self._was_ready = True
        self._away_limit_s = AWAY_S
        self._news: queue.SimpleQueue[Arrival | str | None] = queue.SimpleQueue()
        self._settling: set[asyncio.Task[Any]] = set()
        self._asked: Future[None] | None = None
        self._asked_idle = False
        self._waiting: asyncio.Future[bool] | None = None
        self._stopping = False
        self._draining = False
        self._beating = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    # Called from the engine's thread ------------------------------------------------------------

    def start(self, info: ModelInfo) -> None:
        """Start the thread, tell the API what this worker serves, and show up as alive."""
        self._queue = self._open_queue()
        self._away_limit_s = max(self._away_limit_s, self._queue.lease_s)
        self._info = info
        self._thread.start()
        self._call(self._publish())
        for task in (self._beat, self._report):
            self._call(self._forever(task))
        self._call(Upkeep(self._queue).run())

    def poll(self, capacity: Capacity, wait_s: float = 0.0) -> Inbox:
        """Return the news, waiting up to `wait_s` for some; asks for jobs where there is room."""
        answered = self._asked is None or self._asked.done()
        # With news unread, `capacity` does not count the jobs among them: ask at the next poll.
        room = capacity.jobs > 0 and not self._stopping and not self._store_hangs()
        if room and answered and self._news.empty():
            self._looked_at = time.monotonic()
            self._asked, self._asked_idle = self._call(self._claim(capacity)), capacity.idle
        elif room and capacity.idle and not self._asked_idle:
            wait_s = min(wait_s, BUSY_CLAIM_S)  # the demand of a busy worker ends: ask again soon
        inbox = Inbox([], [])
        news = self._next_news(wait_s)
        while news is not None:
            if isinstance(news, Arrival):
                inbox.arrivals.append(news)
            else:
                inbox.dropped.append(news)
            news = self._next_news(0.0)
        return inbox

    def report(self, key: str, step: int, total: int) -> None:
        """Say that `step` of `total` is done; only the latest of a claim is sent."""
        self._loop.call_soon_threadsafe(self._steps.__setitem__, key, (step, total))

    def ask(self, act: Callable[[JobQueue], Coroutine[Any, Any, T]]) -> Future[T]:
        """Do something with the queue on its own thread, once; errors are in the future."""
        return self._call(act(self._queue))

    def storing(self, claim: Claim) -> None:
        """Say that the engine is done with a claim: from here on the blob store has its time."""
        self._storing[claim.key] = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether this worker takes work: the queue answers, nothing hangs, nobody stops it."""
        away = time.monotonic() - self._answered_at > self._away_limit_s
        faults = away, self._claims_stale(), self._pulse.hung(), self._store_hangs()
        return not (self._stopping or any(faults))

    def complete(self, claim: Claim, result: JobResult) -> Future[bool]:
        """Commit a result, for as long as it takes; False if the claim no longer holds."""
        self._storing.pop(claim.key, None)
        return self._call(self._settle(claim, lambda: self._queue.complete(claim, result)))

    def fail(self, claim: Claim, error: JobError, retry: bool) -> Future[bool]:
        """End the attempt with an error."""
        self._storing.pop(claim.key, None)
        return self._call(self._settle(claim, lambda: self._queue.fail(claim, error, retry)))

    def release(self, claim: Claim) -> Future[bool]:
        """Hand a job back unfinished."""
        return self._call(self._settle(claim, lambda: self._queue.release(claim)))

    def stop_claiming(self, timeout_s: float) -> None:
        """Sign off and take no new jobs; on return the last ones claimed have arrived for `poll`.

        A claim under way is not cut off: its jobs would stay with this worker until their leases
        end.
        """
        self._stopping = True
        self._loop.call_soon_threadsafe(self._stop_waiting)
        signed_off = self._call(self._sign_off())
        with contextlib.suppress(TimeoutError):
            signed_off.result(timeout_s)
        if self._asked is not None:
            with contextlib.suppress(TimeoutError):
                self._asked.result(timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Finish what was said last, sign off and end the thread.

        Gives up on a silent Redis after `timeout_s`.
        """
        goodbye = self._call(self._say_goodbye(timeout_s / 2))
        with contextlib.suppress(TimeoutError):
            goodbye.result(timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    # In the intake thread -----------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(end_tasks(*asyncio.all_tasks(self._loop)))
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _next_news(self, wait_s: float) -> Arrival | str | None:
        try:
            return self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait()
        except queue.Empty:
            return None

    async def _claim(self, capacity: Capacity) -> None:
        """Answer one demand: once for a busy worker, until something comes for an idle one."""
        while not self._stopping:
            try:
                claims = await self._queue.claim(
                    self.worker_id, self.pool, capacity.jobs, capacity.cost_ms, idle=capacity.idle
                )
                now = self._looked_at = self._answered_at = time.monotonic()
                self._last_claim.set_to_current_time()
                for claim in claims:
                    self._held[claim.key] = claim
                    self._arrived[claim.key] = now
                    self._news.put(Arrival(claim, now))
                if claims:
                    return
                if not capacity.idle:
                    await asyncio.sleep(BUSY_CLAIM_S)
                    return
                await self._wait_for_work()
            except QueueUnavailable as error:
                await self._pause("claim", error)
            except Exception:
                log.exception("claim failed")
                await asyncio.sleep(RETRY_S[1])

    async def _wait_for_work(self) -> None:
        self._waiting = asyncio.ensure_future(self._queue.wait_for_work(self.pool, MAX_BLOCK_S))
        await asyncio.wait({self._waiting})
        if not self._waiting.cancelled():
            self._waiting.result()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    async def _beat(self) -> None:
        """Renew the leases, unless the engine hangs; drop the claims that are gone."""
        self._tell_readiness()
        self._let_go_of_the_unstored()
        if self._pulse.hung():
            log.error("no progress: leases are let go", jobs=len(self._held))
        else:
            await self._renew()
            if not self._draining and await self._queue.renew_model(
                self.pool, self._info, self.worker_id
            ):
                log.warning("the offer was gone and stands again", model=self._info.name)
        await asyncio.sleep(self._queue.lease_s / 3)

    async def _renew(self) -> None:
        async with self._beating:  # a beat under way must not overtake the signing off
            held = list(self._held.values())
            # A worker that renews but no longer claims must not be taken for one that takes work.
            closed = self._draining or self._claims_stale()
            gone = await self._queue.heartbeat(self.worker_id, self.pool, held, draining=closed)
        self._answered_at = time.monotonic()
        for claim, state in gone:
            self._drop(claim, state)

    async def _sign_off(self) -> None:
        """Say that this worker takes no more; its leases go on."""
        self._draining = True
        try:
            await self._renew()
        except QueueUnavailable as error:  # the next beat says it
            log.warning("queue away", doing="sign off", reason=error.detail)

    async def _report(self) -> None:
        """Tell the latest step of every job, not too often, and at once that of a doubtful one.

        A job is doubtful when its record no longer shows the claim or its deadline has passed; the
        answer then says who was canceled, so that it leaves the device at its next step. Jobs that
        took no step, since others went first, are looked at as well, but less often.
        """
        await self._look_at_the_waiting()
        claims = {key: self._held[key] for key in self._steps if key in self._held}
        looks = await self._queue.look(list(claims.values()))
        now = time.monotonic()
        for (key, claim), held in zip(claims.items(), looks, strict=True):
            early = now - self._told_at.get(key, 0.0) < PROGRESS_S
            late = claim.left_ms is not None and now >= self._arrived[key] + claim.left_ms / 1000
            if (held and early and not late) or key not in self._steps:
                continue
            self._told_at[key] = now
            state = await self._queue.progress(claim, *self._steps.pop(key))
            if state != "held":
                self._drop(claim, state)
        for known in (self._steps, self._told_at, self._arrived):
            for key in known.keys() - self._held.keys():
                known.pop(key, None)
        await asyncio.sleep(LOOK_S)

    async def _look_at_the_waiting(self) -> None:
        now = time.monotonic()
        if now - self._waiting_seen_at < PROGRESS_S or self._pulse.hung():
            return
        self._waiting_seen_at = now
        busy = self._steps.keys() | self._storing.keys()
        claims = [claim for key, claim in self._held.items() if key not in busy]
        if not all(await self._queue.look(claims)):
            await self._renew()  # says for certain who is gone

    async def _settle(self, claim: Claim, act: Callable[[], Awaitable[bool]]) -> bool:
        """End a claim, retrying while Redis is away: the lease is renewed meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        try:
            stood = await self._insist(act)
        finally:  # whatever happened, a claim nobody works on must not be renewed for ever
            self._held.pop(claim.key, None)
            self._steps.pop(claim.key, None)
        if not stood:
            log.warning("the claim no longer held", job=claim.job_id, claim_no=claim.claim_no)
        return stood

    async def _insist(self, act: Callable[[], Awaitable[bool]]) -> bool:
        while True:
            try:
                return await act()
            except QueueUnavailable as error:
                await self._pause("commit", error)

    def _claims_stale(self) -> bool:
        """Whether the claim loop, asked for jobs, does not come round any more."""
        asking = self._asked is not None and not self._asked.done()
        return asking and time.monotonic() - self._looked_at > self._away_limit_s

    def _store_hangs(self) -> bool:
        limit = time.monotonic() - self._store_s
        return any(since < limit for since in list(self._storing.values()))

    def _let_go_of_the_unstored(self) -> None:
        """Renew no lease of a job that hangs in the blob store: others must get it."""
        limit = time.monotonic() - self._store_s
        for key, claim in list(self._held.items()):
            if self._storing.get(key, limit) < limit:
                log.error("storing hangs: the lease is let go", job=claim.job_id)
                del self._held[key]

    def _tell_readiness(self) -> None:
        if self.ready != self._was_ready:
            self._was_ready = self.ready
            log.warning("ready again" if self._was_ready else "not ready")

    def _drop(self, claim: Claim, state: str) -> None:
        if state == "ended":  # the commit under way came first
            return
        if state == "lost":
            metrics.leases_lost.labels(self.pool).inc()
        if self._held.pop(claim.key, None) is not None:
            log.info("job dropped", job=claim.job_id, claim_no=claim.claim_no, why=state)
            self._news.put(claim.key)

    async def _publish(self) -> None:
        while True:
            try:
                await self._queue.publish_model(self.pool, self._info, self.worker_id)
                return
            except QueueUnavailable as error:
                await self._pause("publish", error)

    async def _forever(self, task: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await task()
            except QueueUnavailable as error:
                await self._pause(task.__name__.strip("_"), error)
            except Exception:
                log.exception("intake task failed", task=task.__name__)
                await asyncio.sleep(RETRY_S[1])

    async def _say_goodbye(self, settle_s: float) -> None:
        if self._settling:
            await asyncio.wait(self._settling, timeout=settle_s)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await end_tasks(*(task for task in others if task is not None))
        with contextlib.suppress(QueueUnavailable):
            await self._queue.sign_off(self.worker_id, self.pool)
        await self._queue.close()

    async def _pause(self, what: str, error: QueueUnavailable) -> None:
        log.warning("queue away", doing=what, reason=error.detail)
        await asyncio.sleep(random.uniform(*RETRY_S))
