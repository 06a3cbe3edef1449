"""Runs the HTTP API in this process: the socket, the signals, the end."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from server.api.address import keys_required
from server.api.app import create_app
from server.api.context import ApiContext
from server.api.internal import InternalServer
from server.config import Settings
from server.errors import ServiceError
from server.log import configure_logging
from server.queue.connection import end_tasks

STOP_S = 5  # how long answers under way may take once the process has been told to stop
IDLE_S = 75

log = structlog.get_logger(__name__)


class _ApiServer(uvicorn.Server):
    """A uvicorn server that ends waiting answers with 202 when it is told to stop."""

    context: ApiContext
    internal: socket.socket | None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve the public port until told to stop, and the internal one, if any, as long."""
        tasks = []
        if self.internal is not None:
            inner = InternalServer(self.context)
            tasks = [asyncio.create_task(inner.serve(sockets=[self.internal]))]
        try:
            await super().serve(sockets)
        finally:
            await end_tasks(*tasks)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit  # the second signal does not wait for answers
        self.should_exit = True
        self.context.stopping.set()


def run_api(
    settings: Settings, *, host: str, port: int, insecure: bool = False, needs_worker: bool = False
) -> int:
    """Serve the API until SIGINT or SIGTERM; returns the exit code.

    Raises ValueError for options that contradict each other, ServiceError if `host` cannot be
    bound.
    """
    with_keys = keys_required(host, insecure, settings.api_keys)
    configure_logging(settings.log_level, process="api")
    app = create_app(
        settings,
        loopback_only=not insecure and not with_keys,
        keys_required=with_keys,
        needs_worker=needs_worker,
    )
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOP_S,
        lifespan="on",
    )
    server = _ApiServer(config)
    server.context = app.state.context
    log.info("api listening", host=host, port=listener.getsockname()[1], keys=with_keys)
    server.internal = _internal_listener(settings)
    with listener, server.internal or contextlib.nullcontext():
        server.run(sockets=[listener])
    return 0


def _internal_listener(settings: Settings) -> socket.socket | None:
    """The socket for probes and metrics; None without a port, or where the default one is taken."""
    if not settings.internal_port:
        return None
    try:
        listener = _listen(settings.internal_host, settings.internal_port)
    except ServiceError as error:
        if settings.chose_internal_port:
            raise
        log.info("no probes and metrics of their own", reason=error.detail)
        return None
    log.info("probes listening", host=settings.internal_host, port=settings.internal_port)
    return listener


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServiceError(f"cannot listen on {host} port {port}: {reason}") from None
