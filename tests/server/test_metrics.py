"""What Prometheus finds: every series from the start, and what one job changes of them."""

import asyncio
import http.client
import json
import re
from pathlib import Path

import httpx

from server import metrics
from server.api.internal import create_internal_app
from server.config import Settings
from server.worker.probes import Probes, open_probes
from server.worker.telemetry import Telemetry
from tests.server.fake_worker import MODEL, service

ROOT = Path(__file__).parents[2]
SAMPLE = re.compile(r"^(lumina_\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


def samples(text: str) -> dict[str, float]:
    """Value by name and labels."""
    return {f"{name}{{{labels or ''}}}": float(v) for name, labels, v in SAMPLE.findall(text)}


def internal(app) -> httpx.AsyncClient:
    inner = create_internal_app(app.state.context)
    return httpx.AsyncClient(transport=httpx.ASGITransport(inner), base_url="http://inside")


def test_the_internal_port_has_probes_metrics_and_the_work_of_a_pool(redis_url, tmp_path):
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it, internal(it.app) as inside:
            for path in ("/livez", "/startupz", "/readyz"):
                assert (await inside.get(path)).status_code == 200, path
            assert (await inside.post("/generate", json={"prompt": "x"})).status_code == 404
            await it.queue.sign_off("fake-1", "default")
            done = await it.generate({"prompt": "hang", "priority": "high"}, Prefer="respond-async")
            await it.until(done.json()["id"], "running")
            scale = (await inside.get("/internal/scale")).json()
            assert (scale["pool"], scale["queued"], scale["running"]) == ("default", 0, 1)
            assert scale["work_seconds"] > 0
            assert (await inside.get("/internal/scale?pool=no%20name")).status_code == 422
            found = samples((await inside.get("/metrics")).text)
            assert found['lumina_jobs_running{pool="default",priority="high"}'] == 1
            assert found['lumina_queue_depth{pool="default",priority="high"}'] == 0
            await it.client.post(f"/jobs/{done.json()['id']}/cancel")

    asyncio.run(scenario())


def test_a_job_is_counted_from_its_request_to_its_end(redis_url, tmp_path):
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it, internal(it.app) as inside:
            before = samples((await inside.get("/metrics")).text)
            assert (await it.generate({"prompt": "a red circle"})).status_code == 200
            refused = await it.generate({"prompt": "late", "deadline_s": 0.001})
            after = samples((await inside.get("/metrics")).text)

            def grown(name: str) -> float:
                return after[name] - before.get(name, 0)

            route = 'route="/generate",method="POST"'
            http_name = f'lumina_http_requests_total{{code="200",{route}}}'
            labelled = {n for n in after if n.startswith("lumina_http_requests_total")}
            one = [n for n in labelled if '"/generate"' in n and '"200"' in n]
            assert [grown(n) for n in one] == [1.0], http_name
            assert grown('lumina_jobs_submitted_total{pool="default"}') == 1
            ended = 'lumina_jobs_finished_total{error="",pool="default",status="succeeded"}'
            assert grown(ended) == 1
            assert (refused.status_code, refused.json()["code"]) == (503, "deadline-too-short")
            assert grown('lumina_jobs_rejected_total{reason="deadline-too-short"}') == 1
            assert grown('lumina_redis_script_seconds_count{script="submit"}') >= 1

    asyncio.run(scenario())


def test_every_series_exists_before_anything_has_happened(redis_url, tmp_path):
    """A rule or a panel must never meet an absent one; names are those of docs/operations.md."""

    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it, internal(it.app) as inside:
            Telemetry("default", "w1").loaded(MODEL, 1.0)
            metrics.worker_last_claim.labels("default", "w1")
            found = {re.sub(r"\{.*", "", n) for n in samples((await inside.get("/metrics")).text)}
            table = (ROOT / "docs" / "operations.md").read_text()
            names = re.findall(r"^\| `(lumina_\w+)`", table, re.MULTILINE)
            assert len(names) == 40
            for name in names:
                assert found & {name, f"{name}_bucket"}, name
            rules = (ROOT / "helm" / "lumina" / "files" / "rules.yaml").read_text()
            for name in set(re.findall(r"lumina_\w+", rules)):
                assert name in found, name

    asyncio.run(scenario())


def test_series_do_not_grow_with_paths_or_methods(redis_url, tmp_path):
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it, internal(it.app) as inside:
            for path in ("/nothing/a", "/nothing/b"):
                await it.client.get(path)
            await it.client.request("BREW", "/nothing/c")
            text = (await inside.get("/metrics")).text
            assert "/nothing" not in text
            assert "BREW" not in text

    asyncio.run(scenario())


def ask(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_worker_answers_probes_while_it_loads_and_computes():
    port, probes = free_port(), Probes()
    server = open_probes(Settings(internal_port=port), probes)
    assert server is not None
    try:
        assert [ask(port, f"/{name}")[0] for name in ("livez", "startupz", "readyz")] == [
            200, 503, 503,
        ]  # fmt: skip
        probes.started, probes.ready = True, lambda: True
        assert ask(port, "/startupz")[0] == ask(port, "/readyz")[0] == 200
        probes.alive = lambda: False
        status, body = ask(port, "/livez")
        assert (status, json.loads(body)) == (503, {"status": "not yet"})
        assert b"lumina_oom_total" in ask(port, "/metrics")[1]
        assert ask(port, "/elsewhere")[0] == 404
    finally:
        server.shutdown()
        server.server_close()


def test_size_classes():
    assert [metrics.size_class(*size) for size in ((512, 64), (64, 513), (1024, 1), (1040, 9))] == [
        "<=512", "<=1024", "<=1024", ">1024",
    ]  # fmt: skip
