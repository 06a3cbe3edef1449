"""The worker's own small HTTP port: probes for its orchestrator, metrics for Prometheus.

Plain `http.server` in a thread: it must answer while the engine computes, and needs no framework.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog

from server import metrics
from server.config import Settings
from server.errors import ServiceError

log = structlog.get_logger(__name__)


@dataclass
class Probes:
    """What the probes ask; replaced once the model is loaded and there is somebody to ask."""

    alive: Callable[[], bool] = lambda: True
    ready: Callable[[], bool] = lambda: False
    started: bool = False


def open_probes(settings: Settings, probes: Probes) -> ThreadingHTTPServer | None:
    """Serve the probes where `settings` want them; None without a port.

    Raises ServiceError where a port that was asked for cannot be had. The default one may be taken
    by another process of the service on the same machine, which is worth a warning only.
    """
    if not settings.internal_port:
        return None
    try:
        return serve_probes(probes, settings.internal_host, settings.internal_port)
    except OSError as error:
        where = f"{settings.internal_host} port {settings.internal_port}"
        reason = error.strerror or str(error)
        if settings.chose_internal_port:
            raise ServiceError(f"cannot listen on {where}: {reason}") from None
        log.debug("no probes and metrics", port=settings.internal_port, reason=reason)
        return None


def serve_probes(probes: Probes, host: str, port: int) -> ThreadingHTTPServer:
    """Answer `/livez`, `/readyz`, `/startupz` and `/metrics` in a thread of this process.

    Raises OSError where the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked: dict[str, Callable[[], bool]] = {
                "/livez": probes.alive,
                "/readyz": probes.ready,
                "/startupz": lambda: probes.started,
            }
            if path == "/metrics":
                self._answer(200, metrics.exposition(), metrics.MEDIA_TYPE)
            elif path in asked:
                good = asked[path]()
                body = json.dumps({"status": "ok" if good else "not yet"}).encode()
                self._answer(200 if good else 503, body, "application/json")
            else:
                self._answer(404, b"", "text/plain")

        def _answer(self, status: int, body: bytes, media_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Probes come twice a second; nobody wants to read of them."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="probes", daemon=True).start()
    log.debug("probes listening", host=host, port=server.server_address[1])
    return server
