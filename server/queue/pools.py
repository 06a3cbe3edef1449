"""PoolBoard: what the workers of each pool offer, and which of them are alive."""

from typing import Any

from server.protocol import DEFAULT_POOL, ModelInfo, WorkerInfo
from server.queue import keys
from server.queue.connection import RedisLine


class PoolBoard(RedisLine):
    """The offers and the workers. All methods raise QueueUnavailable when Redis does not answer."""

    async def publish_model(self, pool: str, info: ModelInfo, worker_id: str = "") -> None:
        """Tell the API what the workers of a pool serve, in place of what stood there."""
        fields: dict[Any, Any] = {"info": info.to_json(), "worker": worker_id, "hash": info.hash}
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(keys.model(pool), mapping=fields)
            pipe.sadd(keys.POOLS, pool)
            await self.ask(pipe.execute())

    async def renew_model(self, pool: str, info: ModelInfo, worker_id: str) -> bool:
        """Publish again if the offer is gone, or is another model's whose worker is gone."""
        return bool(await self.run("offer", pool, worker_id, info.hash, info.to_json()))

    async def model_info(self, pool: str = DEFAULT_POOL) -> ModelInfo | None:
        """Return what a pool serves, None as long as no worker has said so."""
        info = await self.ask(self.redis.hget(keys.model(pool), "info"))
        return None if info is None else ModelInfo.from_json(info)

    async def pools(self) -> list[str]:
        """Return the names of the pools with a published model, sorted."""
        return sorted(await self.ask(self.redis.smembers(keys.POOLS)))

    async def workers(self, pool: str = DEFAULT_POOL) -> list[WorkerInfo]:
        """Return the workers of a pool that take work and beat within the lease."""
        ids = await self.ask(self.redis.zrange(keys.workers(pool), 0, -1))
        async with self.redis.pipeline(transaction=False) as pipe:
            for worker_id in ids:
                pipe.hgetall(keys.worker(worker_id))
            entries = await self.ask(pipe.execute()) if ids else []
        return [
            WorkerInfo(
                id=worker_id,
                pool=entry["pool"],
                running=int(entry["running"]),
                beat_ms=int(entry["beat_ms"]),
            )
            for worker_id, entry in zip(ids, entries, strict=True)
            if entry
        ]

    async def sign_off(self, worker_id: str, pool: str) -> None:
        """Say that a worker is gone, ahead of its silence."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.zrem(keys.workers(pool), worker_id)
            pipe.delete(keys.worker(worker_id))
            await self.ask(pipe.execute())

    async def ping(self) -> None:
        """Return if Redis answers, else raise QueueUnavailable."""
        await self.ask(self.redis.ping())
