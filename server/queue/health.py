"""Preflight and epoch: whether this Redis may hold the queue, and whether it has lost any of it."""

import secrets
import time
from collections.abc import Callable

import structlog

from server.errors import QueueUnavailable
from server.queue import keys
from server.queue.connection import RedisLine

log = structlog.get_logger(__name__)

MEMORY_LOOK_S = 1.0
MEMORY_STALE_S = 5.0
MAX_MEMORY_RATIO = 0.8


class RedisHealth(RedisLine):
    """What a process knows of its Redis beyond the jobs.

    `data_lost` is empty, or says why data must have been lost; it stays until an operator accepts
    (`lumina epoch accept`) and this process has looked again.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.data_lost = ""
        self._epoch, self._seq = "", 0
        self._memory_ratio, self._memory_at = 0.0, -MEMORY_STALE_S
        self._monotonic: Callable[[], float] = time.monotonic

    async def preflight(self) -> list[str]:
        """Send the scripts; return one sentence per setting of Redis that does not suit a queue."""
        await self.preload()
        info = await self.ask(self.redis.info())
        warnings = []
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            warnings.append(
                f"maxmemory-policy is {policy}: Redis may throw jobs away; set noeviction"
            )
        if not info.get("aof_enabled"):
            kept = "only snapshots are kept" if await self._snapshots() else "nothing is kept"
            warnings.append(f"appendonly is off: {kept} over a restart; set appendonly yes")
        if info.get("cluster_enabled"):
            return warnings
        if info.get("role") == "slave":
            warnings.append("this Redis is a replica and takes no writes; connect to its master")
        return warnings

    async def _snapshots(self) -> bool:
        try:
            saves = await self.ask(self.redis.config_get("save"))
        except QueueUnavailable:  # managed servers forbid CONFIG
            return True
        return bool(saves.get("save"))

    async def memory_ratio(self, older_s: float = MEMORY_STALE_S) -> float:
        """Share of maxmemory in use; 0 without a limit. Looked up if older than `older_s`: upkeep
        does so every second, so that a submission need not."""
        if self._monotonic() - self._memory_at >= older_s:
            info = await self.ask(self.redis.info("memory"))
            limit = int(info.get("maxmemory", 0))
            self._memory_ratio = int(info["used_memory"]) / limit if limit else 0.0
            self._memory_at = self._monotonic()
        return self._memory_ratio

    async def epoch(self) -> tuple[str, str]:
        """Return the name of the history in Redis, and why some of it must be lost ("" if not)."""
        name, lost = await self.ask(self.redis.hmget(keys.EPOCH, "id", "lost"))
        return name or "", lost or ""

    async def accept_epoch(self) -> str:
        """Begin a new history after a loss of data; returns its name."""
        epoch: str = await self.run("epoch", secrets.token_hex(8))
        self._note_epoch(epoch, 0, "")
        return epoch

    def _note_seq(self, seq: int) -> None:
        """Remember the logical time of an answer; Redis must not go back behind it."""
        self._seq = max(self._seq, seq)

    def _note_epoch(self, epoch: str, seq: int, lost: str) -> None:
        if lost:
            if not self.data_lost:
                log.error("data lost in Redis; see `lumina epoch`", why=lost)
            self.data_lost = lost
            return
        if epoch != self._epoch:
            self._epoch, self._seq = epoch, seq
        self.data_lost = ""
        self._note_seq(seq)
