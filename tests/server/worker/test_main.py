"""The worker's loop on a real Redis: in this process with a fake pipeline, and as a process."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from server.inspection import picture_facts
from server.protocol import JobSpec, new_job_id
from server.queue.blobs import BlobStore
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.scheduler.scheduler import Scheduler
from server.worker.engine import Engine
from server.worker.intake import Arrival, Inbox, Intake
from server.worker.main import Worker
from server.worker.output import Output
from server.worker.pulse import Pulse
from tests.certificates import make_signing
from tests.fakes import FAKE_INFO, FakePipeline, wait_until
from tests.server.worker.test_engine import claim as claim_of

ROOT = Path(__file__).parents[3]
POOL = "default"


class Caller:
    """Submits and watches jobs, synchronously."""

    def __init__(self, url, **options):
        self.url, self.options = url, options

    def _run(self, act):
        async def main():
            queue = JobQueue(connect(self.url), **self.options)
            try:
                return await act(queue)
            finally:
                await queue.close()

        return asyncio.run(main())

    def submit(self, prompt="a", **fields):
        spec = JobSpec(prompt=prompt, seed=5, **fields)
        return self._run(lambda queue: queue.submit(new_job_id(), spec)).id

    def submit_until(self, deadline_s):
        spec = JobSpec(prompt="a", seed=5)
        return self._run(
            lambda queue: queue.submit(new_job_id(), spec, cost_ms=1, deadline_s=deadline_s)
        ).id

    def get(self, job_id):
        return self._run(lambda queue: queue.get(job_id))

    def cancel(self, job_id):
        return self._run(lambda queue: queue.cancel(job_id))

    def wait(self, job_id, timeout_s=20):
        return self._run(lambda queue: queue.wait(job_id, timeout_s))

    def workers(self):
        return self._run(lambda queue: queue.workers())

    def model(self):
        return self._run(lambda queue: queue.model_info())


@pytest.fixture
def caller(redis_url):
    return Caller(redis_url)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/blobs")


@contextlib.contextmanager
def worker_thread(
    url, blobs, pipeline, *, name="w1", drain_s=5.0, pulse=None, painter=None, **options
):
    """A worker in this process; `options` are the queue's."""
    pulse = pulse or Pulse()
    intake = Intake(lambda: JobQueue(connect(url), **options), name, POOL, pulse)
    worker = Worker(
        Scheduler(max_running=8, max_step_tokens=4096),
        Engine(pipeline, pulse.beat),
        intake,
        Output(intake, blobs, "fake", FAKE_INFO.hash),
        pulse,
        painter,
    )
    intake.start(FAKE_INFO)
    thread = threading.Thread(target=worker.run, args=(drain_s,))
    thread.start()
    try:
        yield worker
    finally:
        worker.stopping = True
        thread.join(20)
        assert not thread.is_alive()


def test_a_job_becomes_a_stored_picture(redis_url, caller, blobs):
    with worker_thread(redis_url, blobs, FakePipeline()):
        record = caller.wait(caller.submit(num_images=2, width=32, height=16))
        assert caller.model() == FAKE_INFO
        assert [w.id for w in caller.workers()] == ["w1"]
    assert record.status == "succeeded"
    result = record.result
    assert (result.model, result.steps.computed, record.step, record.total) == ("fake", 4, 4, 4)
    parts = result.timings
    stages = parts.queue_s + parts.encode_s + parts.denoise_s + parts.decode_s + parts.store_s
    assert parts.total_s == pytest.approx(stages, abs=0.01)
    assert [image.seed for image in result.images] == [5, 6]
    for k, image in enumerate(result.images):
        data = blobs.get(image.path)
        assert image.path == f"results/anonymous/{record.id}/1/{k}.png"
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (image.width, image.height) == (32, 16)
            parameters = json.loads(picture.text["parameters"])
        assert parameters == {
            "prompt": "a", "width": 32, "height": 16, "num_inference_steps": 4,
            "seed": 5 + k, "model": "fake", "model_hash": FAKE_INFO.hash,
        }  # fmt: skip
    assert caller.workers() == []


def test_equal_requests_give_equal_bytes(redis_url, caller, blobs):
    with worker_thread(redis_url, blobs, FakePipeline()):
        first, second = (caller.wait(caller.submit()) for _ in range(2))
    assert first.result.images[0].sha256 == second.result.images[0].sha256
    assert first.result.images[0].path != second.result.images[0].path


def test_jobs_share_steps(redis_url, caller, blobs):
    pipeline = FakePipeline(step_s=0.02, num_steps=30)
    with worker_thread(redis_url, blobs, pipeline):
        ids = [caller.submit(prompt=str(i)) for i in range(4)]
        assert {caller.wait(job_id).status for job_id in ids} == {"succeeded"}
    assert max(len(batch) for batch in pipeline.batches) == 4
    assert len(pipeline.batches) < 4 * 30


def test_bad_jobs_fail_alone(redis_url, caller, blobs):
    with worker_thread(redis_url, blobs, FakePipeline(step_s=0.02)):
        refused, good = caller.submit("refuse"), caller.submit("good")
        assert caller.wait(good).status == "succeeded"
        record = caller.wait(refused)
    assert (record.status, record.error.code) == ("failed", "invalid-request")


def test_an_unexpected_error_spares_the_others(redis_url, caller, blobs):
    with worker_thread(redis_url, blobs, FakePipeline(step_s=0.02), max_attempts=1):
        bad, good = caller.submit("explode"), caller.submit("good")
        assert caller.wait(good).status == "succeeded"
        record = caller.wait(bad)
    assert (record.status, record.error.code) == ("failed", "internal")


def test_an_unexpected_error_gets_another_attempt(redis_url, caller, blobs):
    with worker_thread(redis_url, blobs, FakePipeline()):
        job_id = caller.submit("explode")
        wait_until(lambda: (r := caller.get(job_id)).attempts and r.status == "queued")


def test_a_canceled_job_stops_at_its_next_step(redis_url, caller, blobs):
    pipeline = FakePipeline(step_s=0.02, num_steps=100_000)
    with worker_thread(redis_url, blobs, pipeline) as worker:
        job_id = caller.submit()
        wait_until(lambda: caller.get(job_id).step > 2, what="the job to run")
        assert caller.cancel(job_id).status == "canceled"
        wait_until(lambda: len(worker.scheduler) == 0, 2.0, "the device to be free")
        assert caller.wait(caller.submit(num_inference_steps=2)).status == "succeeded"
    assert caller.get(job_id).status == "canceled"


def test_a_job_lost_before_it_was_begun_is_not_begun(redis_url, blobs):
    claim = claim_of("a")

    class OneNews(Intake):
        def poll(self, capacity, wait_s=0.0):
            return Inbox([Arrival(claim, 0.0)], [claim.key])

    pipeline = FakePipeline()
    intake = OneNews(lambda: JobQueue(connect(redis_url)), "w1", POOL, Pulse())
    scheduler = Scheduler(max_running=8, max_step_tokens=4096)
    output = Output(intake, blobs, "fake", FAKE_INFO.hash)
    worker = Worker(scheduler, Engine(pipeline), intake, output, Pulse())
    worker.turn()
    intake._loop.close()  # it never ran
    assert (len(scheduler), worker.engine.claims(), pipeline.batches) == (0, [], [])


def test_a_late_commit_is_refused_and_its_blobs_removed(redis_url, caller, blobs, tmp_path):
    class Slow(FakePipeline):
        def decode(self, states):
            caller.cancel(job_id)
            return super().decode(states)

    with worker_thread(redis_url, blobs, Slow()):
        job_id = caller.submit()
        assert caller.wait(job_id).status == "canceled"
    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []


def test_a_blob_store_that_fails_is_no_success(redis_url, caller):
    class Broken:
        def put(self, path, data):
            raise OSError("disk full")

    with worker_thread(redis_url, Broken(), FakePipeline(), max_attempts=1):
        record = caller.wait(caller.submit())
    assert (record.status, record.error.code) == ("failed", "store-failed")


def test_draining_finishes_what_fits_and_releases_the_rest(redis_url, caller, blobs):
    pipeline = FakePipeline(step_s=0.02)
    with worker_thread(redis_url, blobs, pipeline, drain_s=2.0) as worker:
        short = caller.submit(num_inference_steps=20)
        endless = caller.submit(num_inference_steps=1000)
        wait_until(lambda: len(worker.scheduler) == 2, what="both to run")
        worker.stopping = True
    late = caller.submit()
    assert caller.get(short).status == "succeeded"
    record = caller.get(endless)
    assert (record.status, record.attempts, record.claim_no) == ("queued", 0, 1)
    assert caller.get(late).status == "queued"


def test_two_workers_share_the_queue(redis_url, caller, blobs):
    one, two = FakePipeline(step_s=0.05), FakePipeline(step_s=0.05)
    with (
        worker_thread(redis_url, blobs, one, name="w1"),
        worker_thread(redis_url, blobs, two, name="w2"),
    ):
        wait_until(lambda: len(caller.workers()) == 2, what="both workers")
        ids = [caller.submit(prompt=str(i)) for i in range(24)]
        records = [caller.wait(job_id) for job_id in ids]
    assert {record.status for record in records} == {"succeeded"}
    assert {record.worker for record in records} == {"w1", "w2"}
    assert all(record.attempts == 1 for record in records)


def test_a_hung_engine_loses_its_lease(redis_url, caller, blobs):
    class Hanging(FakePipeline):
        def denoise_step(self, states):
            if len(self.batches) == 1:
                release.wait(20)
            super().denoise_step(states)

    release = threading.Event()
    pulse = Pulse(min_hang_s=0.3)
    with worker_thread(redis_url, blobs, Hanging(), name="hung", lease_s=0.6, pulse=pulse):
        job_id = caller.submit()
        wait_until(lambda: caller.get(job_id).status == "running", what="the claim")
        with worker_thread(redis_url, blobs, FakePipeline(), name="healthy", lease_s=0.6):
            record = caller.wait(job_id)
        release.set()
    assert (record.status, record.worker, record.attempts) == ("succeeded", "healthy", 2)
    assert caller.get(job_id).result == record.result


# As a process ------------------------------------------------------------------------------------


@pytest.fixture
def worker_process(redis_url, tmp_path):
    """Start `python -m tests.fakes` workers; all are gone after the test."""
    started = []

    def start(step_s=0.02, num_steps=20, **settings):
        variables = {
            "LUMINA_REDIS_URL": redis_url,
            "LUMINA_DATA_DIR": str(tmp_path),
            "LUMINA_LEASE_S": "1.5",
            **{f"LUMINA_{name.upper()}": str(value) for name, value in settings.items()},
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes", str(step_s), str(num_steps)],
            cwd=ROOT,
            env=os.environ | variables,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def ready(caller, count=1):
    wait_until(lambda: len(caller.workers()) == count, 60, "the worker to be ready")


@pytest.mark.slow
def test_a_killed_workers_job_is_finished_by_the_next(caller, worker_process):
    process = worker_process(num_steps=60)
    ready(caller)
    job_id = caller.submit()
    wait_until(lambda: caller.get(job_id).step > 5, what="the job to run")
    process.kill()
    process.wait(5)
    worker_process(num_steps=60)
    record = caller.wait(job_id, 60)
    assert (record.status, record.attempts, record.claim_no) == ("succeeded", 2, 2)


@pytest.mark.slow
def test_a_poison_job_takes_no_batch_mate_with_it(caller, worker_process):
    workers = [worker_process(num_steps=20)]
    ready(caller)
    ids = {prompt: caller.submit(prompt) for prompt in ("a", "b", "kill", "c")}
    records = {}
    for _ in range(400):
        if workers[-1].poll() is not None:
            workers.append(worker_process(num_steps=20))
        records = {prompt: caller.wait(job_id, 0.25) for prompt, job_id in ids.items()}
        if all(record.finished for record in records.values()):
            break
    statuses = {prompt: record.status for prompt, record in records.items()}
    assert statuses == {"a": "succeeded", "b": "succeeded", "c": "succeeded", "kill": "failed"}
    assert records["kill"].error.code == "worker-lost"


@pytest.mark.slow
def test_sigterm_drains_and_exits_with_zero(caller, worker_process):
    process = worker_process(drain_s=10)
    ready(caller)
    job_id = caller.submit(num_inference_steps=50)
    wait_until(lambda: caller.get(job_id).step > 2, what="the job to run")
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    record = caller.get(job_id)
    assert (record.status, record.attempts) == ("succeeded", 1)
    assert caller.workers() == []


@pytest.mark.slow
def test_an_idle_worker_leaves_at_once(caller, worker_process):
    process = worker_process()
    ready(caller)
    process.send_signal(signal.SIGTERM)
    assert process.wait(4) == 0


@pytest.mark.slow
def test_a_worker_outlives_its_redis(tmp_path, worker_process):
    from server.embedded import EmbeddedRedis

    redis = EmbeddedRedis(tmp_path)
    redis.start()
    try:
        caller = Caller(redis.url)
        process = worker_process(redis_url=redis.url, num_steps=100)
        ready(caller)
        job_id = caller.submit()
        wait_until(lambda: caller.get(job_id).step > 2, what="the job to run")
        redis.child.signal(signal.SIGKILL)
        wait_until(lambda: not redis.child.running, what="Redis to be gone")
        assert process.poll() is None
        redis.start()
        assert caller.wait(job_id, 20).status == "succeeded"
        assert caller.wait(caller.submit(num_inference_steps=2), 10).status == "succeeded"
        assert process.poll() is None
    finally:
        redis.stop()


@pytest.mark.slow
def test_a_worker_with_a_certificate_signs_what_it_draws(caller, worker_process, tmp_path):
    files = make_signing(tmp_path)
    worker_process(num_steps=2, c2pa_cert=files.cert, c2pa_key=files.key)
    ready(caller)
    record = caller.wait(caller.submit(output_format="jpeg"), 60)
    (image,) = record.result.images
    path = tmp_path / "a.jpg"
    path.write_bytes(BlobStore(f"file://{tmp_path}/blobs").get(image.path, image.sha256))
    facts = dict(picture_facts(path))
    assert facts["C2PA"].startswith("signature and content agree")
    assert facts["signed by"].startswith("Picture Desk")
    assert (facts["prompt"], facts["seed"]) == ("a", "5")
