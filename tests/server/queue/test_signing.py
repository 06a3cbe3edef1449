"""Signed URLs: for one path, for a while, by one secret."""

import asyncio
from urllib.parse import parse_qsl, urlsplit

import pytest

from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.queue.signing import UrlSigner, signing_secret
from tests.fakes import FakeClock

PATH = "/jobs/01abc/images/0"


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def signer(clock):
    return UrlSigner("secret", now_s=lambda: clock.ms / 1000)


def query_of(url):
    parts = urlsplit(url)
    return dict(parse_qsl(parts.query, keep_blank_values=True))


def test_a_signed_path_is_open_until_it_expires(signer, clock):
    url = signer.sign(PATH, 60)
    assert urlsplit(url).path == PATH
    assert signer.holds(PATH, query_of(url))
    clock.advance(59)
    assert signer.holds(PATH, query_of(url))
    clock.advance(2)
    assert not signer.holds(PATH, query_of(url))


@pytest.mark.parametrize(
    "change",
    [
        {"expires": "9999999999"}, {"expires": ""}, {"expires": "-1"}, {"expires": "1e99"},
        {"expires": "٣"}, {"expires": "9" * 40}, {"signature": ""}, {"signature": "0" * 64},
        {"signature": "ü"},
    ],
)  # fmt: skip
def test_nothing_of_it_can_be_changed(signer, change):
    query = query_of(signer.sign(PATH, 60))
    assert signer.holds(PATH, query)
    assert not signer.holds(PATH, query | change)


def test_it_opens_no_other_path_and_under_no_other_secret(signer, clock):
    query = query_of(signer.sign(PATH, 60))
    assert not signer.holds(PATH[:-1] + "1", query)
    assert not signer.holds("", query)
    assert not signer.holds(PATH, {})
    other = UrlSigner("another", now_s=lambda: clock.ms / 1000)
    assert not other.holds(PATH, query)


def test_processes_on_one_redis_share_one_secret(redis_url):
    async def test():
        first, second = JobQueue(connect(redis_url)), JobQueue(connect(redis_url))
        try:
            found = await asyncio.gather(*(signing_secret(q) for q in (first, second) * 5))
        finally:
            await first.close()
            await second.close()
        assert len(set(found)) == 1
        assert len(found[0]) == 64

    asyncio.run(test())
