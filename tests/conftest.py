"""Fixtures for every test: a real redis-server. Imports are lazy: model tests need no Redis."""

import logging

import pytest


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """One redis-server for the session: the embedded one, as `lumina serve` starts it."""
    from server.embedded import EmbeddedRedis

    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server):
    """The URL of an empty Redis."""
    from redis import Redis

    # A test that queued a hundred thousand jobs leaves much to free.
    with Redis.from_url(redis_server.url, socket_timeout=60) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def kept_logging():
    """For tests that call what a process calls first: logging is as before afterwards."""
    import structlog

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
