"""DurableLine: how safe a job is before its submission is acknowledged.

`everysec`: as safe as Redis keeps it (`lumina serve`: on disk within about a second). `fsync`: on
the disk of the server. `replica`: in the memory of a second server, for a failover.
"""

import time
from typing import Any, Literal

from server.errors import QueueUnavailable
from server.queue import keys
from server.queue.connection import answer_of
from server.queue.health import RedisHealth

Durability = Literal["everysec", "fsync", "replica"]

# A server that fsyncs once a second needs up to that; below the time any answer may take.
CONFIRM_MS = 2500
LOOK_S = 10.0
WAITAOF_SINCE = (7, 2)


class DurableLine(RedisHealth):
    """Runs scripts whose effect must outlive the server, or part of it."""

    durability: Durability = "everysec"
    _confirm: tuple[str, ...] = ()
    _confirm_until = 0.0

    @property
    def confirm_s(self) -> float:
        """How much longer than other answers a durable one may take."""
        return 0.0 if self.durability == "everysec" else CONFIRM_MS / 1000

    async def run_durably(self, name: str, *args: str | int) -> Any:
        """Run a script and wait until its writes are as safe as asked for.

        Raises QueueUnavailable where they are not in time: they may stand all the same, so the call
        must be safe to repeat.
        """
        confirm = await self._confirmation()
        if not confirm:
            return await self.run(name, *args)
        # One connection for both: Redis waits for the writes of the connection that asks.
        async with self.redis.pipeline(transaction=False) as pipe:
            await self._scripts[name](keys=[keys.SEQ], args=[self._now(), *args], client=pipe)
            pipe.execute_command(*confirm)
            reply, confirmed = await self.ask(pipe.execute())
        answer = answer_of(reply)
        copies = confirmed[0] if isinstance(confirmed, list) else confirmed
        if int(copies) < 1:
            what = "on disk" if self.durability == "fsync" else "on a replica"
            raise QueueUnavailable(f"the job was not {what} within {CONFIRM_MS / 1000:g} s")
        return answer

    async def _confirmation(self) -> tuple[str, ...]:
        """The command that waits; none where nothing need be waited for. Looked up now and then:
        after a failover another server answers."""
        if self.durability == "everysec":
            return ()
        if time.monotonic() >= self._confirm_until:
            self._confirm = await self._look_up()
            self._confirm_until = time.monotonic() + LOOK_S
        return self._confirm

    async def _look_up(self) -> tuple[str, ...]:
        if self.durability == "replica":
            return ("WAIT", "1", str(CONFIRM_MS))
        info = await self.ask(self.redis.info())
        version = tuple(int(part) for part in info["redis_version"].split(".")[:2])
        if not info.get("aof_enabled"):
            raise QueueUnavailable("LUMINA_DURABILITY is fsync, but Redis has appendonly off")
        if version >= WAITAOF_SINCE:
            return ("WAITAOF", "1", "0", str(CONFIRM_MS))
        policy = (await self.ask(self.redis.config_get("appendfsync"))).get("appendfsync")
        if policy != "always":
            raise QueueUnavailable(
                f"LUMINA_DURABILITY is fsync, which needs Redis 7.2 or appendfsync always; this is "
                f"Redis {info['redis_version']} with appendfsync {policy}"
            )
        return ()
