"""The intake on a real Redis, without an engine."""

import asyncio
import signal
import time

import structlog
from redis import Redis

from server.embedded import EmbeddedRedis
from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.scheduler.scheduler import Capacity
from server.worker.intake import Intake
from server.worker.pulse import Pulse
from tests.fakes import FAKE_INFO, wait_until
from tests.server.queue.helpers import BOOM, RESULT
from tests.server.worker.test_main import POOL, Caller

ROOM_FOR_TWO = Capacity(jobs=2, cost_ms=1e9, idle=False)
ALL_ROOM = Capacity(jobs=2, cost_ms=1e9, idle=True)
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


def test_a_worker_that_falls_idle_asks_again_at_once(redis_url):
    class Slow(JobQueue):
        async def claim(self, *args, **options):
            found = await super().claim(*args, **options)
            await asyncio.sleep(REPLY_S)
            return found

    intake = make_intake(redis_url, Slow)
    intake.start(FAKE_INFO)
    try:
        assert intake.poll(ROOM_FOR_TWO).arrivals == []  # asks, as a busy worker
        job_id = Caller(redis_url).submit()
        started = time.monotonic()
        arrivals = wait_until(lambda: intake.poll(ALL_ROOM, 10.0).arrivals)
        assert time.monotonic() - started < 5.0  # did not sit out the wait with nothing asked
        assert [arrival.claim.job_id for arrival in arrivals] == [job_id]
    finally:
        intake.stop(3.0)


def test_progress_is_told_four_times_a_second_and_a_cancellation_heard_at_once(redis_url):
    class Counting(JobQueue):
        told = 0

        async def progress(self, claim, step, total):
            Counting.told += 1
            return await super().progress(claim, step, total)

    caller = Caller(redis_url)
    job_id = caller.submit()
    intake = Intake(lambda: Counting(connect(redis_url)), "w1", POOL, Pulse())
    intake.start(FAKE_INFO)
    try:
        (arrival,) = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
        key, started, step = arrival.claim.key, time.monotonic(), 0
        while time.monotonic() < started + 1.2:
            step += 1
            intake.report(key, step, 1000)
            time.sleep(0.005)
        took_s = time.monotonic() - started
        assert 2 <= Counting.told <= 4 * took_s + 1
        assert 0 < caller.get(job_id).step <= step
        caller.cancel(job_id)
        canceled = time.monotonic()
        intake.report(key, step + 1, 1000)
        assert wait_until(lambda: intake.poll(FULL).dropped, 5.0) == [key]
        assert time.monotonic() - canceled < 2.0  # a heartbeat would have taken up to 5 s
    finally:
        intake.stop(3.0)


def test_a_job_that_waits_for_others_on_the_device_is_canceled_as_soon(redis_url):
    caller = Caller(redis_url)
    canceled, kept = caller.submit(), caller.submit()
    intake = Intake(lambda: JobQueue(connect(redis_url)), "w1", POOL, Pulse())
    intake.start(FAKE_INFO)
    try:
        arrivals = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
        keys = {each.claim.job_id: each.claim.key for each in arrivals}
        time.sleep(REPLY_S)  # the first beat, after which 5 s pass
        caller.cancel(canceled)
        started = time.monotonic()
        assert wait_until(lambda: intake.poll(FULL).dropped, 10.0) == [keys[canceled]]
        assert time.monotonic() - started < 3.0
        assert caller.get(kept).status == "running"
    finally:
        intake.stop(3.0)


def test_a_passed_deadline_ends_the_claim_at_its_next_step(redis_url):
    caller = Caller(redis_url)
    job_id = caller.submit_until(0.6)
    intake = Intake(lambda: JobQueue(connect(redis_url)), "w1", POOL, Pulse())
    intake.start(FAKE_INFO)
    try:
        (arrival,) = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
        assert 0 < arrival.claim.left_ms <= 600
        key = arrival.claim.key
        intake.report(key, 1, 1000)
        dropped = wait_until(lambda: intake.report(key, 2, 1000) or intake.poll(FULL).dropped, 5.0)
        assert dropped == [key]
        assert caller.get(job_id).status == "expired"
    finally:
        intake.stop(3.0)


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


def make_intake(redis_url, queue_type=JobQueue, pulse=None, lease_s=0.6, **options):
    return Intake(
        lambda: queue_type(connect(redis_url), lease_s=lease_s),
        "w1",
        POOL,
        pulse or Pulse(),
        **options,
    )


def test_a_job_that_hangs_in_the_blob_store_is_let_go_and_nothing_new_is_claimed(redis_url):
    caller = Caller(redis_url)
    stuck, healthy, later = (caller.submit() for _ in range(3))
    intake = make_intake(redis_url, store_s=0.3)
    intake.start(FAKE_INFO)
    try:
        arrivals = wait_until(lambda: intake.poll(ROOM_FOR_TWO).arrivals)
        wait_until(lambda: arrivals.extend(intake.poll(FULL).arrivals) or len(arrivals) == 2)
        claims = {arrival.claim.job_id: arrival.claim for arrival in arrivals}
        intake.storing(claims[stuck])
        intake.storing(claims[healthy])
        assert intake.complete(claims[healthy], RESULT).result(5.0)
        wait_until(lambda: caller.get(stuck).status == "queued", what="the lease to be let go")
        assert not intake.ready
        for _ in range(5):
            assert intake.poll(ALL_ROOM).arrivals == []
            time.sleep(REPLY_S / 5)
        assert caller.get(later).status == "queued"
        intake.fail(claims[stuck], BOOM, retry=True).result(5.0)  # at last the store has answered
        assert intake.ready
        assert wait_until(lambda: intake.poll(ALL_ROOM).arrivals)
    finally:
        intake.stop(3.0)


def test_a_worker_is_ready_while_its_queue_answers_and_its_engine_moves(tmp_path):
    redis = EmbeddedRedis(tmp_path)
    redis.start()
    pulse = Pulse(min_hang_s=0.2)
    intake = make_intake(redis.url, pulse=pulse)
    try:
        intake.start(FAKE_INFO)
        intake._away_limit_s = 1.0
        assert intake.ready
        time.sleep(0.3)
        assert not intake.ready  # the engine hangs
        pulse.beat()
        assert intake.ready
        redis.child.signal(signal.SIGKILL)

        def ready():
            pulse.beat()
            return intake.ready

        wait_until(lambda: not redis.child.running, what="Redis to be gone")
        wait_until(lambda: not ready(), 10, "the silence to be noticed")
        redis.start()
        wait_until(ready, 10, "the worker to be ready again")
        intake.stop_claiming(1.0)
        assert not ready()
    finally:
        intake.stop(3.0)
        redis.stop()


def test_a_worker_whose_claims_get_stuck_is_not_listed(redis_url):
    class Stuck(JobQueue):
        async def claim(self, *args, **options):
            await asyncio.sleep(3600)

    caller = Caller(redis_url)
    intake = make_intake(redis_url, Stuck)
    intake._away_limit_s = 0.7
    intake.start(FAKE_INFO)
    try:
        wait_until(caller.workers)
        intake.poll(ROOM_FOR_TWO)
        wait_until(lambda: not caller.workers(), what="the worker to be unlisted")
        assert not intake.ready
    finally:
        intake.stop(3.0)
