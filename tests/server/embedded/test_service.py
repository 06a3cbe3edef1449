"""`lumina serve` as a user runs it: processes, signals, what is left behind."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from redis import Redis

from server.config import Settings
from server.embedded.data_dir import locked
from server.embedded.service import (
    LOAD_FAULT,
    _forget_workers,
    _Service,
    num_gpus,
    run_service,
)
from server.errors import ServiceError
from server.queue import keys
from tests.fakes import wait_until
from tests.server.embedded.test_children import gone
from tests.tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Service:
    """A `lumina serve` process."""

    def __init__(self, model, data_dir, workers=1, options=(), **settings):
        self.port = free_port()
        self.lines = []
        argv = ["serve", "--model", model, "--data-dir", data_dir, "--port", self.port]
        argv += ["--workers", workers, *options]
        variables = {f"LUMINA_{name.upper()}": str(value) for name, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", *map(str, argv)],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = []
        for pipe, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=self._collect, args=(pipe, lines), daemon=True).start()

    @staticmethod
    def _collect(pipe, lines):
        with pipe:
            for line in pipe:
                lines.append(line.rstrip("\n"))

    def wait_ready(self):
        wait_until(lambda: self.lines or self.process.poll() is not None, 180, "the ready line")
        assert self.lines, self.errors

    def children(self):
        """Process ids and command lines of the direct children."""
        listing = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        commands = {}
        for pid in listing.split():
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
            commands[int(pid)] = raw.replace(b"\0", b" ").decode()
        return commands

    def workers(self):
        return [pid for pid, command in self.children().items() if "worker" in command]

    def call(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if body is not None:
                headers = {"content-type": "application/json", **headers}
            connection.request(method, path, body and json.dumps(body), headers)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


@pytest.fixture
def serve(checkpoint, tmp_path):
    """Start services; they are gone after the test."""
    started = []

    def start(model=checkpoint, **settings):
        service = Service(model, tmp_path / "data", **settings)
        started.append(service)
        return service

    yield start
    for service in started:
        service.end()


@pytest.mark.slow
@pytest.mark.timeout(400)  # several starts with torch, which on a busy machine take a minute each
def test_a_killed_worker_costs_no_job_and_sigterm_leaves_no_process(serve):
    service = serve(lease_s=2)
    service.wait_ready()
    assert service.lines == [
        f"lumina-serve ready on http://127.0.0.1:{service.port} (1 worker, model tiny)"
    ]
    body = {"prompt": "a red circle", "num_inference_steps": 60}
    job = service.call("POST", "/generate", body, Prefer="respond-async")["id"]
    wait_until(lambda: service.call("GET", f"/jobs/{job}")["step"] > 2, what="the job to run")
    (worker,) = service.workers()
    os.kill(worker, signal.SIGKILL)
    record = wait_until(
        lambda: (
            (r := service.call("GET", f"/jobs/{job}"))["status"] != "queued"
            and r["status"] != "running"
            and r
        ),
        180,
        "the job's end",
    )
    assert (record["status"], record["attempt"]) == ("succeeded", 2)
    assert service.workers() != [worker]

    second = serve()
    assert second.process.wait(60) == 1
    assert "in use by another lumina serve" in second.errors[-1]

    children = service.children()
    assert len(children) == 3
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert all(gone(pid) for pid in children)


@pytest.mark.slow
@pytest.mark.timeout(400)  # several starts with torch, which on a busy machine take a minute each
def test_a_killed_parent_takes_its_children_and_a_restart_finds_the_job(serve):
    service = serve(lease_s=2)
    service.wait_ready()
    body = {"prompt": "a red circle", "num_inference_steps": 100}
    job = service.call("POST", "/generate", body, Prefer="respond-async")["id"]
    wait_until(lambda: service.call("GET", f"/jobs/{job}")["step"] > 2, what="the job to run")
    children = service.children()
    service.process.kill()
    wait_until(lambda: all(gone(pid) for pid in children), 5, "the children's end")
    again = serve(lease_s=2)
    again.wait_ready()
    wait_until(lambda: again.call("GET", f"/jobs/{job}")["status"] == "succeeded", 60, "the job")
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(15) == 0


@pytest.mark.very_slow
@pytest.mark.timeout(400)  # several starts with torch, which on a busy machine take a minute each
def test_a_damaged_checkpoint_ends_the_service_in_one_line(serve, tmp_path, checkpoint):
    broken = tmp_path / "broken"
    make_tiny_checkpoint(broken)
    (broken / "vae" / "config.json").write_text("{")
    service = serve(broken, workers=3)  # they all notice; one says so
    assert service.process.wait(180) == 2
    assert service.lines == []
    told = [line for line in service.errors if line.startswith("lumina")]
    assert len(told) == 1
    assert "vae/config.json" in told[0]
    assert not any("Traceback" in line for line in service.errors)


@pytest.mark.very_slow
@pytest.mark.timeout(400)
def test_a_model_that_cannot_run_ends_the_service(serve, tmp_path, checkpoint):
    """Not a fault of the files but of this machine: the first caption asks for terabytes."""
    huge = Path(shutil.copytree(checkpoint, tmp_path / "huge"))
    config = huge / "transformer" / "config.json"
    content = json.loads(config.read_text()) | {"axes_lens": [2**40, 512, 512]}
    config.write_text(json.dumps(content))
    service = serve(huge)
    assert service.process.wait(180) == 1
    (line,) = [text for text in service.errors if text.startswith("lumina")]
    assert "loading failed: RuntimeError" in line
    assert not any("Traceback" in text for text in service.errors)


@pytest.mark.usefixtures("kept_logging")
def test_a_taken_port_is_one_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=f"cannot listen on 127.0.0.1 port {port}"):
            run_service(Settings(data_dir=tmp_path), tmp_path, port=port)


@pytest.mark.usefixtures("kept_logging")
def test_an_embedded_redis_has_no_replica(tmp_path):
    with pytest.raises(ServiceError, match="LUMINA_DURABILITY=replica needs"):
        run_service(Settings(data_dir=tmp_path, durability="replica"), tmp_path, port=free_port())


def test_what_an_earlier_run_offered_is_forgotten(redis_url):
    with Redis.from_url(redis_url) as client:
        for key in (keys.model("default"), keys.worker("w1"), keys.job("x")):
            client.hset(key, "a", "b")
        client.zadd(keys.workers("default"), {"w1": 1})
        client.sadd(keys.POOLS, "default")
        _forget_workers(redis_url)
        assert client.keys() == [keys.job("x").encode()]


class Restarting:
    """Stands for a child that ended `failures` times in a row."""

    def __init__(self, failures):
        self.name, self.failures = "worker-0", failures


@pytest.mark.parametrize(
    ("failures", "code", "ready", "hopeless"),
    [
        (4, LOAD_FAULT, True, False),
        (5, LOAD_FAULT, True, True),
        (5, -9, True, False),  # poison jobs kill workers: those are started for ever
        (5, -9, False, True),
    ],
)
def test_a_worker_that_never_comes_up_is_given_up(
    tmp_path, capsys, failures, code, ready, hopeless
):
    service = _Service({}, tmp_path, 1, "127.0.0.1", 8000, False)
    try:
        assert service._hopeless(Restarting(failures), code, ready) is hopeless
    finally:
        service.close()
    assert capsys.readouterr().err.count("giving up") == hopeless


def test_a_data_directory_has_one_owner(tmp_path):
    with locked(tmp_path), pytest.raises(ServiceError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 0), ("-1", 0), ("3", 1)])
def test_visible_gpus_are_counted_without_torch(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == count


@pytest.mark.parametrize(
    ("host", "insecure", "told"), [("0.0.0.0", False, True), ("0.0.0.0", True, False)]
)
def test_the_first_line_says_where_keys_are_needed(tmp_path, host, insecure, told):
    service = _Service({"LUMINA_API_KEYS": "auto"}, tmp_path, 1, host, 8000, insecure)
    assert ("API keys required: `lumina keys create`" in service._greeting()) == told
    service.close()
