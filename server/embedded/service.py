"""run_service: supervises redis-server, the API and the workers of `lumina serve`."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO

import structlog
from redis import Redis

from server import metrics
from server.api.address import keys_required
from server.config import ENV_PREFIX, Settings
from server.embedded.children import Child, spawn, stop_children
from server.embedded.data_dir import locked
from server.embedded.redis_server import EmbeddedRedis
from server.errors import ServiceError
from server.log import configure_logging
from server.queue import keys

log = structlog.get_logger(__name__)

POLL_S = 0.1
READY_POLL_S = 0.5
# Together with Redis's own, at most ten seconds beyond the drain.
WORKER_GRACE_S = 4.0
API_GRACE_S = 4.0
MISUSE = 2  # exit code of a child that must not be restarted
LOAD_FAULT = 3  # exit code of a worker that could not load its model
MAX_LOAD_FAULTS = 5  # in a row; the pauses between grow from half a second to eight


def num_gpus() -> int:
    """Return the number of GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def run_service(
    settings: Settings,
    model_dir: Path,
    *,
    workers: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    insecure: bool = False,
    own_redis: bool = True,
    worker_options: Sequence[str] = (),
) -> int:
    """Run the whole service until SIGINT or SIGTERM; prints one line when it is ready.

    Args:
        settings: passed on to the children through the environment.
        model_dir: the checkpoint every worker serves.
        workers: worker processes; None: one per GPU, or one on the CPU.
        host: where the API listens.
        port: where the API listens; 0 for any that is free.
        insecure: passed on to the API.
        own_redis: start a redis-server; otherwise `settings.redis_url` is used.
        worker_options: more words for the command line of every worker.

    Returns the exit code: 0 after an orderly end, 2 where a child was given what cannot be served,
    1 where one cannot go on. Raises ServiceError when the service cannot start. Must be called from
    the main thread.
    """
    configure_logging(settings.log_level)
    with ExitStack() as stack:
        lock = stack.enter_context(locked(settings.data_dir))
        port = _free_port(host, port)
        signals = stack.enter_context(_Signals())
        redis = None
        redis_url = settings.redis_url
        if own_redis:
            redis = _own_redis(settings, lock)
            stack.callback(redis.stop)
            redis.start()
            redis_url = redis.url
            _forget_workers(redis_url)
        service = _Service(
            _environment(settings, redis_url),
            model_dir,
            workers,
            host,
            port,
            insecure,
            worker_options,
        )
        stack.callback(service.stop, settings.drain_s, signals)
        stack.callback(service.close)
        return service.run(redis.child if redis else None, signals)


class _Signals:
    """SIGINT and SIGTERM, counted; a background job's ignored SIGINT is taken up too."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "_Signals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.count += 1


class _Service:
    """The API and the workers, as children."""

    def __init__(
        self,
        env: dict[str, str],
        model_dir: Path,
        workers: int | None,
        host: str,
        port: int,
        insecure: bool,
        worker_options: Sequence[str] = (),
    ) -> None:
        self._env = env
        self._worker_options = worker_options
        self._model_dir = model_dir
        self._host, self._port, self._insecure = host, port, insecure
        # One byte in a pipe: the worker that takes it may say what is wrong with the checkpoint.
        self._token, giver = os.pipe2(os.O_NONBLOCK)
        os.write(giver, b"1")
        os.close(giver)
        gpus = num_gpus()
        count = workers or max(1, gpus)
        self.api = Child("api", self._spawn_api, self._forget)
        self.workers = [
            Child(
                f"worker-{i}",
                lambda i=i: self._spawn_worker(i, count, gpus),  # type: ignore[misc]
                self._forget,
            )
            for i in range(count)
        ]

    def run(self, redis: Child | None, signals: _Signals) -> int:
        """Start everything and keep it running; returns the exit code."""
        for child in (self.api, *self.workers):
            child.start()
        ready, asked_at = False, 0.0
        while not signals.count:
            for child in (self.api, *self.workers):
                code = child.check()
                if code == MISUSE:
                    return MISUSE  # it has said why
                if code is not None and (
                    (not ready and self._cannot(child, code)) or self._hopeless(child, code, ready)
                ):
                    return 1
            if redis is not None:
                redis.check()
            if not ready and time.monotonic() - asked_at > READY_POLL_S:
                asked_at = time.monotonic()
                ready = self._is_ready()
                if ready:
                    print(self._greeting(), flush=True)
            time.sleep(POLL_S)
        return 0

    def close(self) -> None:
        """Close what the children inherited."""
        os.close(self._token)

    def _hopeless(self, child: Child, code: int, ready: bool) -> bool:
        """Whether a child that ended just now will not come up, however often it is started."""
        loading = code == LOAD_FAULT or not ready
        if child is self.api or not loading or child.failures < MAX_LOAD_FAULTS:
            return False
        print(
            f"lumina serve: {child.name} could not load its model {child.failures} times in a row "
            f"(exit code {code}); giving up",
            file=sys.stderr,
            flush=True,
        )
        return True

    def stop(self, drain_s: float, signals: _Signals) -> None:
        """Workers first, so that the API can still answer those whose jobs they finish."""
        seen = signals.count

        def impatient() -> bool:
            return signals.count > max(1, seen)

        stop_children(self.workers, drain_s + WORKER_GRACE_S, impatient)
        stop_children([self.api], API_GRACE_S, impatient)

    def _cannot(self, child: Child, code: int) -> bool:
        """Whether a child that ended before the service was ready would only do so again.

        A worker that gave up by itself could not load its checkpoint; one that was killed may be
        luckier next time.
        """
        return child is self.api or code > 0

    def _greeting(self) -> str:
        count = len(self.workers)
        name = self._model_dir.resolve().name
        mode = self._env[ENV_PREFIX + "API_KEYS"]
        keyed = keys_required(self._host, self._insecure, mode)
        return (
            f"lumina-serve ready on http://{_url_host(self._host)}:{self._port} "
            f"({count} worker{'s' if count > 1 else ''}, model {name}"
            f"{', API keys required: `lumina keys create`' if keyed else ''})"
        )

    def _is_ready(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        connection = http.client.HTTPConnection(host, self._port, timeout=2.0)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _forget(self, pid: int) -> None:
        """Drop the gauges of a child that has ended."""
        metrics.forget_process(pid, self._env[metrics.FOLDER_VARIABLE])

    # Only the command lines of workers contain the word: users count them by it.
    def _spawn_api(self) -> "subprocess.Popen[bytes]":
        argv = ["api", "--host", self._host, "--port", str(self._port), "--needs-model"]
        if self._insecure:
            argv.append("--insecure")
        return spawn([sys.executable, "-m", "server.cli", *argv], self._env)

    def _spawn_worker(self, index: int, count: int, gpus: int) -> "subprocess.Popen[bytes]":
        env = dict(self._env)
        if gpus:
            visible = env.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range(gpus)]
            env["CUDA_VISIBLE_DEVICES"] = devices[index % gpus].strip()
        else:
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
            env.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))
        argv = ["worker", "--model", str(self._model_dir), "--token-fd", str(self._token)]
        argv += self._worker_options
        return spawn([sys.executable, "-m", "server.cli", *argv], env, pass_fds=[self._token])


def _own_redis(settings: Settings, lock: IO[str]) -> EmbeddedRedis:
    if settings.durability == "replica":
        raise ServiceError(
            "LUMINA_DURABILITY=replica needs a Redis that has a replica: give --redis-url"
        )
    fsync = "always" if settings.durability == "fsync" else "everysec"
    return EmbeddedRedis(settings.data_dir, pass_fds=[lock.fileno()], fsync=fsync)


def _free_port(host: str, port: int) -> int:
    """Return `port`, any free one for 0; raises ServiceError where nobody can listen on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServiceError(f"cannot listen on {host} port {port}: {reason}") from None


def _forget_workers(redis_url: str) -> None:
    """Drop what workers of an earlier run left in our own Redis: nobody but us has started any.

    A killed service leaves their last heartbeats behind; they would make it look ready too early.
    Their offers go too: the new ones may serve another model.
    """
    with Redis.from_url(redis_url) as client:
        for pattern in (f"{keys.PREFIX}worker*", keys.model("*"), keys.POOLS):
            for key in client.scan_iter(pattern):
                client.delete(key)


def _environment(settings: Settings, redis_url: str) -> dict[str, str]:
    """The children's environment: every setting as its variable."""
    values = settings.model_dump() | {
        "redis_url": redis_url,
        "internal_port": 0,  # one `/metrics` for all, on the main port
        "data_dir": settings.data_dir.resolve(),
        "lora_dir": settings.lora_dir.resolve() if settings.lora_dir else None,
    }
    set_values = {name: value for name, value in values.items() if value is not None}
    shared = {metrics.FOLDER_VARIABLE: str(_metrics_folder(settings.data_dir))}
    return (
        os.environ | shared | {ENV_PREFIX + name.upper(): str(v) for name, v in set_values.items()}
    )


def _metrics_folder(data_dir: Path) -> Path:
    """An empty folder in which the children keep the values of their metrics."""
    folder = data_dir.resolve() / "metrics"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
