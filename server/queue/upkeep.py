"""Upkeep: what every process does beside its work, so that any one of them suffices."""

import asyncio
import random
import time

import structlog

from server.errors import QueueUnavailable
from server.queue.blobs import BlobStore
from server.queue.health import MEMORY_LOOK_S
from server.queue.jobs import JobQueue
from server.queue.sweeper import sweep

log = structlog.get_logger(__name__)

TURN_S = (0.5, 1.5)
RECONCILE_S = 10.0
SWEEP_S = (240.0, 360.0)


class Upkeep:
    """Reaps, reconciles, checks Redis after every connection and sweeps the blob store.

    Args:
        queue: the queue to keep.
        blobs: swept too, if given.
    """

    def __init__(self, queue: JobQueue, blobs: BlobStore | None = None) -> None:
        self._queue = queue
        self._blobs = blobs
        self._checked = False
        self._reconcile_at = time.monotonic() + RECONCILE_S
        self._sweep_at = time.monotonic() + random.uniform(*SWEEP_S) / 10

    async def run(self) -> None:
        """Do so for ever; whatever goes wrong is logged."""
        while True:
            await asyncio.sleep(random.uniform(*TURN_S))
            try:
                await self.turn()
            except QueueUnavailable as error:
                self._checked = False  # another Redis may answer next
                log.warning("queue away", doing="upkeep", reason=error.detail)
            except Exception:
                log.exception("upkeep failed")

    async def turn(self) -> None:
        """Do once what is due; raises QueueUnavailable."""
        if not self._checked:
            for warning in await self._queue.preflight():
                log.warning("unsuitable Redis", why=warning)
            self._checked = True
        await self._queue.memory_ratio(MEMORY_LOOK_S)
        taken = await self._queue.reap()
        if taken:
            log.warning("jobs taken back from silent workers", jobs=taken)
        now = time.monotonic()
        if now >= self._reconcile_at:
            self._reconcile_at = now + RECONCILE_S
            found = await self._queue.reconcile()
            if found:
                log.error("running jobs without a lease", jobs=found)
        if self._blobs is not None and now >= self._sweep_at:
            self._sweep_at = now + random.uniform(*SWEEP_S)
            await sweep(self._queue, self._blobs)
