"""LoadBoard: how much work there is, for metrics and autoscaling. Reads only."""

from dataclasses import dataclass

from server.queue import keys
from server.queue.health import RedisHealth

DEAD_PAGE = 1000


@dataclass(frozen=True)
class PriorityLoad:
    """Jobs of one pool and priority. `work_s` is the estimated device time of the queued ones,
    `running_work_s` what is left of the running ones; `oldest_s` the age of the oldest queued."""

    queued: int
    oldest_s: float
    work_s: float
    running: int
    running_work_s: float


@dataclass(frozen=True)
class RedisState:
    """What an operator must know of Redis: whether it still writes what it must keep, its memory
    over its limit, and the number of webhooks that wait."""

    persistence_ok: bool
    memory_ratio: float
    outbox: int


class LoadBoard(RedisHealth):
    """All methods raise QueueUnavailable when Redis does not answer."""

    async def load(self, pool: str) -> dict[str, PriorityLoad]:
        """Return the load of a pool by priority."""
        return {
            priority: PriorityLoad(queued, age / 1000, cost / 1000, running, left / 1000)
            for priority, queued, age, cost, running, left in await self.run("load", pool)
        }

    async def dead_by_pool(self) -> dict[str, int]:
        """Return the number of dead jobs of each pool that has any."""
        counts: dict[str, int] = {}
        ids = await self.ask(self.redis.zrange(keys.DEAD, 0, -1))
        for start in range(0, len(ids), DEAD_PAGE):
            async with self.redis.pipeline(transaction=False) as pipe:
                for job_id in ids[start : start + DEAD_PAGE]:
                    pipe.hget(keys.job(job_id), "pool")
                for pool in await self.ask(pipe.execute()):
                    counts[pool or ""] = counts.get(pool or "", 0) + 1
        return counts

    async def redis_state(self) -> RedisState:
        """Return what Redis says of itself."""
        info = await self.ask(self.redis.info("persistence"))
        if info.get("aof_enabled"):
            kept = info.get("aof_last_write_status") == "ok"
        else:
            kept = info.get("rdb_last_bgsave_status") == "ok" and await self._snapshots()
        return RedisState(
            persistence_ok=kept,
            memory_ratio=await self.memory_ratio(),
            outbox=int(await self.ask(self.redis.zcard(keys.OUTBOX))),
        )
