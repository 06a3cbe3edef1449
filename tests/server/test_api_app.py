"""The application as a whole: imports, probes, and a real server's disconnects."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import uvicorn

from server.api.app import create_app
from tests.server.fake_worker import running_worker, service, service_settings


def test_the_api_imports_no_torch() -> None:
    code = (
        "import sys, server.api.app, server.api.main\n"
        "print(sorted({'torch', 'model', 'kernels', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_probes(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False, needs_worker=True) as it:
            for path in ("/livez", "/startupz"):
                assert (await it.client.get(path)).status_code == 200
            waiting = await it.client.get("/readyz")
            assert (waiting.status_code, waiting.json()["code"]) == (503, "model-not-ready")
            async with running_worker(it.app.state.context.settings):
                async with asyncio.timeout(5):
                    while (await it.client.get("/readyz")).status_code != 200:
                        await asyncio.sleep(0.01)
        async with service(redis_url, tmp_path, worker=False) as it:
            assert (await it.client.get("/readyz")).status_code == 200

    asyncio.run(scenario())


def test_presets_tell_what_the_model_offers(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            offer = (await it.client.get("/presets")).json()
            assert offer["model"] == "demo"
            assert offer["limits"] == {
                "min_size": 64, "max_size": 128, "size_multiple": 16,
                "max_steps": 50, "max_images": 8, "max_prompt_tokens": 64,
            }  # fmt: skip
            assert offer["defaults"]["num_inference_steps"] == 20
            assert offer["presets"] == {
                "fast": {"num_inference_steps": 8}, "flow": {"sampler": "dpm"},
            }  # fmt: skip
            assert offer["loras"] == ["ink", "wool"]

    asyncio.run(scenario())


@pytest.mark.parametrize("when", ["running", "queued"])
def test_a_client_that_leaves_cancels_its_job(redis_url: str, tmp_path: Path, when: str) -> None:
    async def scenario() -> None:
        settings = service_settings(redis_url, tmp_path)
        config = uvicorn.Config(create_app(settings), port=0, log_config=None, lifespan="on")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        async with asyncio.timeout(20), running_worker(settings) as queue:
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                if when == "queued":
                    other = {"prompt": "hang"}
                    headers = {"prefer": "respond-async"}
                    await client.post("/generate", json=other, headers=headers)
                    while await queue.depth():
                        await asyncio.sleep(0.01)
                before = set(await queue.redis.keys("{lumina}:job:*"))
                job_id = await _ask_and_leave(port, queue.redis, before)
                record = await queue.wait(job_id, 3)
                assert record.status == "canceled"
                assert (record.started_ms is None) == (when == "queued")
            server.should_exit = True
            await serving

    asyncio.run(scenario())


async def _ask_and_leave(port: int, redis, before: set[str]) -> str:  # type: ignore[no-untyped-def]
    """Open a connection by hand, ask for a picture, wait until the job exists, and hang up."""
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": "hang up"}).encode()
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    await writer.drain()
    while not (new := set(await redis.keys("{lumina}:job:*")) - before):
        await asyncio.sleep(0.01)
    key = new.pop()
    await asyncio.sleep(0.2)
    writer.close()
    await writer.wait_closed()
    return str(key).rsplit(":", 1)[1]
