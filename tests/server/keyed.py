"""A test service that demands API keys, and clients that have one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from server.protocol import DEFAULT_POOL
from server.queue.api_keys import ApiKey, KeyRing
from tests.server.fake_worker import MODEL, Service, service


class KeyedService:
    """A service whose callers need keys."""

    def __init__(self, it: Service) -> None:
        self.app, self.queue, self.anonymous = it.app, it.queue, it.client
        self.ring = KeyRing(it.queue)
        self.clients: list[httpx.AsyncClient] = []

    async def publish(self) -> None:
        """Offer the fake worker's model, without a worker."""
        await self.queue.publish_model(DEFAULT_POOL, MODEL)

    async def member(self, **options: Any) -> tuple[ApiKey, httpx.AsyncClient]:
        """A new key, and a client that sends it."""
        key, text = await self.ring.create(**options)
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://lumina.example",
            headers={"authorization": f"Bearer {text}"},
            timeout=30,
        )
        self.clients.append(client)
        return key, client


@asynccontextmanager
async def keyed(redis_url: str, folder: Path, **options: Any) -> AsyncIterator[KeyedService]:
    """A service that demands keys; `options` are those of `service`."""
    async with service(redis_url, folder, keys_required=True, **options) as it:
        them = KeyedService(it)
        try:
            yield them
        finally:
            for client in them.clients:
                await client.aclose()
