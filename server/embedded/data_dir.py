"""The data directory: who holds it, and reaching the Redis in it from outside the service."""

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from server.embedded.redis_server import EmbeddedRedis, running_url
from server.errors import ServiceError


class InUse(ServiceError):
    """Another service holds the data directory."""


@contextmanager
def locked(data_dir: Path) -> Iterator[IO[str]]:
    """Hold the data directory; raises InUse if another service does."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"the data directory {data_dir} is in use by another lumina serve"
            ) from None
        yield lock


@contextmanager
def borrowed_redis(data_dir: Path) -> Iterator[str]:
    """The URL of the Redis with the data in `data_dir`: that of a running service, or one that is
    started for the while and holds the directory. Raises ServiceError.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(data_dir))
        except InUse:
            url = running_url(data_dir)
        else:
            redis = EmbeddedRedis(data_dir, pass_fds=[lock.fileno()])
            stack.callback(redis.stop)
            redis.start()
            url = redis.url
        yield url
