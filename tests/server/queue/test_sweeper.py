"""The sweep: pictures live exactly as long as somebody may ask for them."""

import dataclasses
import os
import time

import pytest

from server.protocol import ImageRef, new_job_id
from server.queue import keys
from server.queue.blobs import BlobStore, image_path
from server.queue.sweeper import sweep
from tests.server.queue.helpers import BOOM, RESULT, claim_one, submit


@pytest.fixture
def store(tmp_path):
    return BlobStore(f"file://{tmp_path}/blobs")


def put(store, claim):
    path = image_path(claim.tenant, claim.job_id, claim.claim_no, 0, "png")
    digest = store.put(path, b"picture")
    ref = ImageRef(path=path, sha256=digest, width=1, height=1, seed=1, format="png")
    return path, dataclasses.replace(RESULT, images=(ref,))


async def swept(queue, store):
    await queue.redis.delete(keys.SWEEP)
    return await sweep(queue, store)


def test_stale_claims_go_and_the_committed_one_stays(in_queue, store):
    async def test(queue):
        await submit(queue)
        first = await claim_one(queue)
        stale, _ = put(store, first)
        assert await swept(queue, store) == 0  # it still runs
        await queue.release(first)
        held = await claim_one(queue)
        path, result = put(store, held)
        assert await swept(queue, store) == 1
        assert not store.exists(stale)
        await queue.complete(held, result)
        assert await swept(queue, store) == 0
        assert store.get(path) == b"picture"

    in_queue(test)


@pytest.mark.parametrize("end", ["fail", "cancel"])
def test_jobs_without_a_result_keep_no_pictures(in_queue, store, tmp_path, end):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        put(store, held)
        if end == "fail":
            await queue.fail(held, BOOM, retry=False)
        else:
            await queue.cancel(held.job_id)
        assert await swept(queue, store) == 1

    in_queue(test)
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_pictures_end_with_their_record(in_queue, store, tmp_path):
    async def test(queue):
        await submit(queue)
        held = await claim_one(queue)
        path, result = put(store, held)
        await queue.complete(held, result)
        await queue.redis.delete(keys.job(held.job_id))  # as its TTL does
        assert await swept(queue, store) == 0
        long_ago = time.time() - queue.result_ttl - 1
        os.utime(tmp_path / "blobs" / path, (long_ago, long_ago))
        assert await swept(queue, store) == 1
        assert not store.exists(path)
        assert await swept(queue, store) == 0
        assert store.jobs("anonymous") == []

    in_queue(test)


def test_one_process_sweeps_and_none_after_a_loss_of_data(in_queue, store):
    async def test(queue):
        path = image_path("anonymous", new_job_id(), 1, 0, "png")
        store.put(path, b"picture")
        queue.result_ttl = -10
        queue.data_lost = "the epoch is gone"
        assert await swept(queue, store) == 0
        queue.data_lost = ""
        assert await sweep(queue, store) == 0  # the lock of the last sweep
        assert await swept(queue, store) == 1

    in_queue(test)
