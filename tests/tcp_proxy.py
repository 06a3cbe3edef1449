"""A TCP proxy in front of a unix socket, to do to a connection what networks do."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator


class Proxy:
    """Forwards to `path`. Set `delay_s`, or `silent` (as half-open connections are), or
    `lose_answers` (what was asked arrives, its answer does not and the connection is reset)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.port = 0
        self.delay_s = 0.0
        self.silent = False
        self.lose_answers = False
        self.connections = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        back_reader, back_writer = await asyncio.open_unix_connection(self.path)
        there = asyncio.create_task(self._pump(reader, back_writer, answers=False))
        back = asyncio.create_task(self._pump(back_reader, writer, answers=True))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            for each in (writer, back_writer):
                each.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        while data := await source.read(65536):
            if answers and self.lose_answers:
                return
            await asyncio.sleep(self.delay_s)
            if not self.silent:
                sink.write(data)
                await sink.drain()


@contextlib.asynccontextmanager
async def proxy(socket_path: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Proxy]:
    """A running proxy, which ends TLS if given a context; its connections end with it."""
    it = Proxy(socket_path)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await it.serve(reader, writer)
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
