"""Two API processes and four workers on one Redis behave as one service."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.embedded import EmbeddedRedis
from tests.fakes import wait_until
from tests.server.embedded.test_service import free_port
from tests.server.worker.test_main import Caller

ROOT = Path(__file__).parents[2]
NUM_WORKERS = 4
ENDED = {"succeeded", "failed", "canceled", "expired"}


class Api:
    """One of the API processes."""

    def __init__(self, settings):
        self.port = free_port()
        argv = [sys.executable, "-m", "server.cli", "api", "--port", str(self.port)]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=os.environ | settings, stderr=subprocess.DEVNULL
        )

    def call(self, method, path, body=None, **headers):
        """The status and the JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            given = {"content-type": "application/json", **named}
            connection.request(method, path, body and json.dumps(body), given)
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if b"json" in bytes(
                answer.getheader("content-type", ""), "ascii"
            ) else data
        finally:
            connection.close()

    def queue(self, prompt, **fields):
        status, job = self.call(
            "POST", "/generate", {"prompt": prompt, **fields}, prefer="respond-async"
        )
        assert status == 202, job
        return job["id"]

    def ready(self):
        with contextlib.suppress(OSError):
            return self.call("GET", "/readyz")[0] == 200


@pytest.fixture
def one_service(tmp_path):
    """Two API processes, four workers whose engine only waits, and the Redis between them."""
    redis = EmbeddedRedis(tmp_path)
    redis.start()
    settings = {
        "LUMINA_REDIS_URL": redis.url,
        "LUMINA_DATA_DIR": str(tmp_path),
        "LUMINA_LEASE_S": "2",
        "LUMINA_TENANT_LIMIT": "64",
        "LUMINA_MAX_RUNNING": "2",
        "LUMINA_LOG_LEVEL": "error",
    }
    argv = [sys.executable, "-m", "tests.fakes", "0.05", "20"]
    workers = [
        subprocess.Popen(argv, cwd=ROOT, env=os.environ | settings) for _ in range(NUM_WORKERS)
    ]
    apis = [Api(settings) for _ in range(2)]
    caller = Caller(redis.url)
    try:
        wait_until(lambda: len(caller.workers()) == NUM_WORKERS, 100, "the workers")
        wait_until(lambda: all(api.ready() for api in apis), 60, "the APIs")
        yield *apis, workers, caller
    finally:
        for process in (*workers, *(api.process for api in apis)):
            process.kill()
            process.wait(10)
        redis.stop()


def ended(api, job_id):
    return wait_until(lambda: (r := api.call("GET", f"/jobs/{job_id}")[1])["status"] in ENDED and r)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_apis_and_four_workers_are_one_service(one_service):
    a, b, workers, caller = one_service

    # What one takes, the other knows: the job, its picture, its end.
    job_id = a.queue("x", seed=7)
    record = ended(b, job_id)
    pictures = [api.call("GET", record["images"][0]["url"]) for api in (a, b)]
    assert pictures[0] == pictures[1]
    assert pictures[0][0] == 200

    # A caller who waits at one is woken by what happens through the other.
    endless = a.queue("x", num_inference_steps=1000)
    answers = []
    body = {"prompt": "x", "num_inference_steps": 1000}
    waiter = threading.Thread(
        target=lambda: answers.append(a.call("POST", "/generate", body, idempotency_key="same"))
    )
    waiter.start()
    wait_until(lambda: caller.get(endless).step > 2, what="the job to run")
    status, again = wait_until(
        lambda: (r := b.call(
            "POST", "/generate", body, idempotency_key="same", prefer="respond-async"
        ))[0] == 202 and r
    )  # fmt: skip
    for other in (again["id"], endless):
        assert b.call("POST", f"/jobs/{other}/cancel")[1]["status"] == "canceled"
    waiter.join(20)
    assert answers[0][0] == 409
    assert answers[0][1]["job"] == again["id"]
    assert a.call("GET", f"/jobs/{endless}")[1]["status"] == "canceled"

    # All four share the work; a worker and an API that die cost no job.
    ids = [api.queue("x", seed=seed) for seed in range(20) for api in (a, b)]
    wait_until(lambda: any(caller.get(job_id).status == "running" for job_id in ids))
    workers[0].kill()
    a.process.send_signal(signal.SIGKILL)
    records = [ended(b, job_id) for job_id in ids]
    assert {record["status"] for record in records} == {"succeeded"}
    assert len({caller.get(job_id).worker for job_id in ids}) >= NUM_WORKERS - 1

    # One cap for a tenant, whoever counts.
    long = {"num_inference_steps": 1000}
    opened = [b.queue("x", **long) for _ in range(64)]
    status, problem = b.call("POST", "/generate", {"prompt": "x"}, prefer="respond-async")
    assert (status, problem["code"]) == (429, "too-many-jobs")
    for job_id in opened:
        b.call("POST", f"/jobs/{job_id}/cancel")
