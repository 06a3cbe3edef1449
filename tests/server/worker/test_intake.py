"""The intake on a real Redis, without an engine."""

import time

import structlog
from redis import Redis

from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.scheduler.scheduler import Capacity
from server.worker.intake import Intake
from server.worker.pulse import Pulse
from tests.fakes import FAKE_INFO, wait_until
from tests.server.worker.test_main import POOL, Caller

ROOM_FOR_TWO = Capacity(jobs=2, cost_ms=1e9, idle=False)
FULL = Capacity(jobs=0, cost_ms=0.0, idle=False)
REPLY_S = 0.3


def test_room_is_filled_once_and_the_last_words_get_through(redis_url):
    caller = Caller(redis_url)
    ids = [caller.submit() for _ in range(6)]
    intake = Intake(lambda: JobQueue(connect(redis_url)), "w1", POOL, Pulse())
    intake.start(FAKE_INFO)
    try:
        arrivals = intake.poll(ROOM_FOR_TWO).arrivals
        time.sleep(REPLY_S)
        arrivals += intake.poll(ROOM_FOR_TWO).arrivals
        assert [arrival.claim.job_id for arrival in arrivals] == ids[:2]
        time.sleep(REPLY_S)
        assert intake.poll(FULL).arrivals == []  # those two have taken the room
        for arrival in arrivals:
            intake.release(arrival.claim)
    finally:
        intake.stop(3.0)
    records = [caller.get(job_id) for job_id in ids[:2]]
    assert [(r.status, r.attempts) for r in records] == [("queued", 0)] * 2


def test_a_draining_worker_signs_off_at_once_and_keeps_its_leases(redis_url):
    caller = Caller(redis_url)
    job_id = caller.submit()
    intake = Intake(lambda: JobQueue(connect(redis_url), lease_s=0.9), "w1", POOL, Pulse())
    intake.start(FAKE_INFO)
    try:
        (arrival,) = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
        wait_until(caller.workers)
        intake.stop_claiming(3.0)
        assert caller.workers() == []
        time.sleep(1.5)  # several beats and reaps later
        assert caller.workers() == []
        assert caller.get(job_id).status == "running"
        assert intake.release(arrival.claim).result(3.0)
    finally:
        intake.stop(3.0)


def test_an_unexpected_error_while_claiming_is_logged_and_survived(redis_url):
    class Faulty(JobQueue):
        failed = False

        async def claim(self, *args, **options):
            if not self.failed:
                self.failed = True
                raise KeyError("a bug")
            return await super().claim(*args, **options)

    caller = Caller(redis_url)
    job_id = caller.submit()
    intake = Intake(lambda: Faulty(connect(redis_url)), "w1", POOL, Pulse())
    with structlog.testing.capture_logs() as logs:
        intake.start(FAKE_INFO)
        try:
            (arrival,) = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
            assert arrival.claim.job_id == job_id
        finally:
            intake.stop(3.0)
    assert "claim failed" in [entry["event"] for entry in logs]


def test_the_offer_is_put_up_again_after_a_flush(redis_url):
    intake = Intake(lambda: JobQueue(connect(redis_url), lease_s=0.6), "w1", POOL, Pulse())
    caller = Caller(redis_url)
    intake.start(FAKE_INFO)
    try:
        wait_until(caller.model)
        with Redis.from_url(redis_url) as client:
            client.flushall()
        assert wait_until(caller.model, 5.0) == FAKE_INFO
    finally:
        intake.stop(3.0)
