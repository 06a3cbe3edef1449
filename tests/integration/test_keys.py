"""A real API process that others can reach: keys are made and revoked while it runs."""

import os
import subprocess
import sys

import pytest

from server import cli
from tests.fakes import wait_until
from tests.integration.test_one_service import ROOT, Api


class PublicApi(Api):
    """An API process on all addresses."""

    def __init__(self, redis_url, *options):
        argv = [sys.executable, "-m", "server.cli", "api", "--redis-url", redis_url,
                "--host", "0.0.0.0", "--port", "0", *options]  # fmt: skip
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE, text=True
        )
        lines = iter(self.process.stderr.readline, "")
        line = next((line for line in lines if "api listening" in line), "")
        if not line:
            raise AssertionError(f"the API ended with {self.process.wait(30)}")
        self.port = int(line.split('"port": ')[1].split(",")[0].rstrip("}\n"))

    def stop(self):
        """End the process; returns what it logged."""
        self.process.terminate()
        _, told = self.process.communicate(timeout=30)
        return told


@pytest.mark.slow
def test_a_public_service_answers_those_with_a_key(redis_url, capsys):
    def lumina(*argv):
        assert cli.main(["keys", *argv, "--redis-url", redis_url]) == 0
        return capsys.readouterr().out.strip()

    def call(path, key, host="pictures.example"):
        return api.call("GET", path, authorization=f"Bearer {key}", host=host)[0]

    first = lumina("create")
    api = PublicApi(redis_url)
    try:
        assert wait_until(api.ready)
        for host in ("localhost", "pictures.example"):
            status, body = api.call("GET", "/usage", host=host)
            assert (status, body["code"]) == (401, "unauthorized")
        assert call("/usage", first) == 200
        second = lumina("create", "--scope", "admin")
        assert (call("/admin/dead", first), call("/admin/dead", second)) == (403, 200)
        lumina("revoke", lumina("list").split()[0])
        assert call("/usage", first) == 401
    finally:
        told = api.stop()
    assert first not in told
    assert second not in told


@pytest.mark.slow
def test_insecure_serves_everybody_but_not_as_administrator(redis_url):
    api = PublicApi(redis_url, "--insecure")
    try:
        assert wait_until(api.ready)
        assert api.call("GET", "/usage", host="a.example")[1]["tenant"] == "anonymous"
        assert api.call("GET", "/admin/dead")[0] == 403
    finally:
        api.stop()
