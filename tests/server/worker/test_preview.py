"""Previews of watched jobs and partial pictures asked for, on a real Redis."""

import asyncio
import io
import random
import time
from itertools import pairwise

import pytest
from PIL import Image

from server.protocol import JobSpec, new_job_id
from server.queue.blobs import BlobStore
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.queue.keys import PREVIEW_LIMIT_BYTES
from server.worker.loading import load_model
from server.worker.preview import encode_preview, partial_number
from tests.fakes import FakePipeline, wait_until
from tests.server.worker.test_main import worker_thread
from tests.tiny_checkpoint import make_tiny_checkpoint


class FakePainter:
    """Draws the step number as a grey; `full` fails on demand."""

    def __init__(self):
        self.drawn = []
        self.broken = False

    def rough(self, latents):
        self.drawn.append(("rough", latents))
        return Image.new("RGB", (8, 6), (latents % 256,) * 3)

    def full(self, latents):
        if self.broken:
            raise RuntimeError("no picture")
        self.drawn.append(("full", latents))
        return Image.new("RGB", (64, 48), (latents % 256,) * 3)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/blobs")


def ask(url, act):
    async def main():
        queue = JobQueue(connect(url))
        try:
            return await act(queue)
        finally:
            await queue.close()

    return asyncio.run(main())


def submit(url, *, watched=False, **fields):
    spec = JobSpec(prompt="a", seed=5, **fields)
    return ask(url, lambda queue: queue.submit(new_job_id(), spec, watched=watched)).id


def test_a_watched_job_has_a_preview_that_follows_it(redis_url, blobs):
    painter, pipeline = FakePainter(), FakePipeline(step_s=0.02, num_steps=400)
    with worker_thread(redis_url, blobs, pipeline, painter=painter, drain_s=0.0):
        job_id = submit(redis_url, watched=True)
        first = wait_until(lambda: ask(redis_url, lambda queue: queue.preview(job_id)))
        with Image.open(io.BytesIO(first)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (256, 192))
        wait_until(lambda: ask(redis_url, lambda queue: queue.preview(job_id)) != first)
    assert {kind for kind, _ in painter.drawn} == {"rough"}


def test_nothing_is_drawn_for_a_job_nobody_watches(redis_url, blobs):
    painter, pipeline = FakePainter(), FakePipeline(step_s=0.01, num_steps=150)
    with worker_thread(redis_url, blobs, pipeline, painter=painter):
        job_id = submit(redis_url)
        record = ask(redis_url, lambda queue: queue.wait(job_id, 30))
    assert record.status == "succeeded"
    assert painter.drawn == []


def test_exactly_the_partial_pictures_asked_for_are_kept(redis_url, blobs):
    painter, pipeline = FakePainter(), FakePipeline(step_s=0.01, num_steps=12)
    with worker_thread(redis_url, blobs, pipeline, painter=painter):
        job_id = submit(redis_url, partial_images=3, num_images=2)

        async def partials(queue):
            return [[await queue.partial(job_id, i, k) for k in range(4)] for i in range(2)]

        def complete():
            found = ask(redis_url, partials)
            return found if all(all(row[:3]) for row in found) else None

        found = wait_until(complete)
    assert [latents for _, latents in painter.drawn] == [3, 3, 6, 6, 9, 9]
    for row in found:
        assert row[3] is None
        assert len(set(row[:3])) == 3


def test_a_job_does_not_end_before_its_partial_pictures_are_there(redis_url, blobs):
    class Slow(FakePainter):
        def full(self, latents):
            time.sleep(0.3)  # longer than all steps together
            return super().full(latents)

    with worker_thread(redis_url, blobs, FakePipeline(), painter=Slow()):
        job_id = submit(redis_url, partial_images=3, num_images=2)

        async def at_the_end(queue):
            record = await queue.wait(job_id, 30)
            assert record.status == "succeeded"
            return [await queue.partial(job_id, i, k) for i in range(2) for k in range(3)]

        assert all(ask(redis_url, at_the_end))


def test_a_preview_that_fails_harms_nobody(redis_url, blobs):
    painter = FakePainter()
    painter.broken = True
    with worker_thread(redis_url, blobs, FakePipeline(), painter=painter):
        job_id = submit(redis_url, partial_images=2)
        assert ask(redis_url, lambda queue: queue.wait(job_id, 30)).status == "succeeded"


@pytest.mark.parametrize("wanted", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [4, 5, 20, 30, 50])
def test_partials_lie_evenly_and_before_the_end(num_steps, wanted):
    due = {
        step: number
        for step in range(num_steps + 1)
        if (number := partial_number(step, num_steps, wanted)) is not None
    }
    assert list(due.values()) == list(range(wanted))
    ends = [0, *due, num_steps]
    gaps = [b - a for a, b in pairwise(ends)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def test_few_steps_give_few_partials():
    assert [partial_number(step, 2, 3) is not None for step in range(3)] == [False, True, False]
    assert partial_number(1, 1, 3) is None
    assert partial_number(3, 10, 0) is None


def test_any_picture_fits_into_a_preview():
    noise = Image.frombytes("RGB", (1024, 1024), random.Random(1).randbytes(3 * 1024 * 1024))
    data = encode_preview(noise)
    assert len(data) <= PREVIEW_LIMIT_BYTES
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size[0] in (256, 512, 1024)


@pytest.mark.slow
def test_a_real_model_draws_previews_beside_its_steps(redis_url, blobs, tmp_path):
    model = load_model(make_tiny_checkpoint(tmp_path / "tiny"))
    with worker_thread(redis_url, blobs, model.pipeline, painter=model.painter):
        job_id = submit(
            redis_url, watched=True, num_inference_steps=40, partial_images=2, width=64, height=48
        )

        async def pictures(queue):
            partials = [await queue.partial(job_id, 0, k) for k in range(2)]
            return await queue.preview(job_id), *partials

        found = wait_until(lambda: all(p := ask(redis_url, pictures)) and p, 60.0)
        record = ask(redis_url, lambda queue: queue.wait(job_id, 60))
    assert record.status == "succeeded"
    sizes = [Image.open(io.BytesIO(data)).size for data in found]
    assert sizes == [(256, 192), (64, 48), (64, 48)]
    assert found[1] != found[2]
