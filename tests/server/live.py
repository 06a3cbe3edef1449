"""The application on a real port, in this event loop: for streams, which ASGI clients swallow."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import structlog
import uvicorn
from fastapi import FastAPI

from server.api.app import create_app
from server.config import Settings
from tests.server.fake_worker import Service, running_worker, service_settings

ROOT = Path(__file__).parents[2]
LIMITS = httpx.Limits(max_connections=None)


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[int]:
    """Serve an application; yields its port."""
    config = uvicorn.Config(
        app, port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        app.state.context.stopping.set()
        server.should_exit = True
        await serving


@asynccontextmanager
async def live_service(
    redis_url: str,
    folder: Path,
    *,
    worker: bool = True,
    keys_required: bool = False,
    **changes: object,
) -> AsyncIterator[Service]:
    """A service on a port, with a fake worker; `changes` go to the settings."""
    settings: Settings = service_settings(redis_url, folder, **changes)
    app = create_app(settings, keys_required=keys_required)
    async with (
        listening(app) as port,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=60, limits=LIMITS, trust_env=False
        ) as client,
    ):
        if not worker:
            yield Service(app, client, app.state.context.queue)
            return
        async with running_worker(settings) as queue:
            yield Service(app, client, queue)


class Sse:
    """One event as a reader sees it."""

    def __init__(self, block: str) -> None:
        self.comments: list[str] = []
        fields: dict[str, str] = {}
        for line in block.split("\n"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name:
                fields[name] = value
            else:
                self.comments.append(value)
        self.id = fields.get("id")
        self.event = fields.get("event")
        self.data = fields.get("data")
        self.retry = fields.get("retry")


async def read_events(response: httpx.Response) -> AsyncIterator[Sse]:
    """The events of a stream, comments too, as they come."""
    text = ""
    async for piece in response.aiter_text():
        text += piece
        *blocks, text = text.split("\n\n")
        for block in blocks:
            yield Sse(block)
    assert text == "", "a stream ends with a whole event"


@contextmanager
def service_process(redis_url: str, folder: Path, **changes: object) -> Iterator[str]:
    """A live service with a fake worker in a process of its own; yields its base URL."""
    argv = [sys.executable, "-m", "tests.server.live", redis_url, str(folder), json.dumps(changes)]
    process = subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate()  # it ends with its standard input
        assert process.returncode == 0


async def _serve(redis_url: str, folder: str, changes: str) -> None:
    async with live_service(redis_url, Path(folder), **json.loads(changes)) as it:
        print(it.client.base_url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    asyncio.run(_serve(*sys.argv[1:]))
