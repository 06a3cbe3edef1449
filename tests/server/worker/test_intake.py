"""The intake on a real Redis, without an engine."""

import time

from server.queue.connection import connect
from server.queue.jobs import JobQueue
from server.scheduler.scheduler import Capacity
from server.worker.intake import Intake
from server.worker.pulse import Pulse
from tests.fakes import FAKE_INFO
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
