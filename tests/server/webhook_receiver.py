"""A receiver of webhooks on this machine, and who is who for tests that need other names."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field


@dataclass
class Heard:
    """One request as it came."""

    line: str
    headers: dict[str, str]
    body: str


@dataclass
class Receiver:
    """Answers each request with the next of `answers`, the last one for ever; None hangs."""

    answers: Sequence[bytes | None]
    port: int = 0
    heard: list[Heard] = field(default_factory=list)
    connections: int = 0

    async def until(self, count: int) -> None:
        """Wait for so many requests."""
        async with asyncio.timeout(20):
            while len(self.heard) < count:
                await asyncio.sleep(0.01)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request and answer it."""
        self.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            line, *rest = head.strip().split("\r\n")
            headers = {
                name.lower(): value for name, value in (part.split(": ", 1) for part in rest)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.heard.append(Heard(line, headers, body.decode()))
            answer = self.answers[min(len(self.heard), len(self.answers)) - 1]
            if answer is None:
                await reader.read()  # until the caller hangs up
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()


def status(code: int, *headers: str, body: str = "") -> bytes:
    """An answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {code} Whatever", f"Content-Length: {len(body)}", *headers, "", body]
    return "\r\n".join(lines).encode()


@contextlib.asynccontextmanager
async def receiving(
    *answers: bytes | None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Receiver]:
    """A receiver on a loopback port."""
    receiver = Receiver(answers or (status(204),))
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
