"""`lumina generate --url`: files, words, exit codes, and what a Ctrl-C leaves."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server import cli
from tests.server.fake_worker import Service
from tests.server.live import live_service

ROOT = Path(__file__).parents[2]


def run(redis_url: str, folder: Path, scenario: Any) -> None:
    async def main() -> None:
        async with live_service(redis_url, folder) as it:
            await scenario(it)

    asyncio.run(main())


async def lumina(it: Service, argv: Sequence[str]) -> int:
    """The exit code of a command that draws at the service."""
    url = str(it.client.base_url)
    return await asyncio.to_thread(cli.main, ["generate", *argv, "--url", url])


def test_a_server_draws_what_the_command_line_says(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(it: Service) -> None:
        png, webp = str(tmp_path / "a.png"), str(tmp_path / "b.webp")
        argv = [
            "warn",
            "-o",
            png,
            "--seed",
            "5",
            "--width",
            "64",
            "--steps",
            "4",
            "--no-parameters",
        ]
        argv += ["--preset", "fast", "--set", "priority=high", "--set", 'loras=[{"name": "ink"}]']
        assert await lumina(it, argv) == 0
        told = capsys.readouterr()
        assert f"{png}: 64x128, seed 5, model demo, " in told.out
        assert "lumina: warning: a warning\n" in told.err
        with Image.open(png) as picture:
            assert (picture.format, picture.size) == ("PNG", (64, 128))
        (job,) = (await it.client.get("/jobs")).json()["jobs"]
        record = await it.queue.get(job["id"])
        assert record is not None
        spec = json.loads(record.spec.to_json())
        assert (spec["num_inference_steps"], spec["preset"]) == (4, "fast")
        assert (spec["embed_parameters"], spec["loras"][0]["name"]) == (False, "ink")
        assert record.priority == "high"
        assert await lumina(it, ["x", "-o", webp]) == 0
        with Image.open(webp) as picture:
            assert picture.format == "WEBP"

    run(redis_url, tmp_path, scenario)


def test_errors_are_one_line_and_misuse_is_2(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.png"
    cases = [
        (2, ["--width", "65"], "width must be"),
        (2, ["--set", "shft=3"], "did you mean 'shift'?"),
        (2, ["--set", "num_images=2"], "one picture"),
        (2, ["--set", "output_format=webp"], "twice"),
        (2, ["--preset", "none"], "preset must be one that demo has"),
        (2, ["--model", "other"], "other"),
        (2, ["--precision", "fp32"], "--precision is for drawing in this process"),
        (2, ["--lora-dir", str(tmp_path)], "--lora-dir is for drawing in this process"),
    ]

    async def scenario(it: Service) -> None:
        for code, more, words in cases:
            assert await lumina(it, ["x", "-o", str(output), *more]) == code, more
            line = capsys.readouterr().err
            assert line.startswith("lumina: "), line
            assert line.count("\n") == 1, line
            assert words in line
        assert await lumina(it, ["fail", "-o", str(output)]) == 1
        line = capsys.readouterr().err
        assert line.endswith(": It broke.\n")
        assert line.count("\n") == 1

    run(redis_url, tmp_path, scenario)
    for url, words in (("ftp://x", "url 'ftp://x'"), ("localhost:8000", "url 'localhost:8000'")):
        assert cli.main(["generate", "x", "-o", str(output), "--url", url]) == 2
        assert words in capsys.readouterr().err
    assert not output.exists()


def test_a_key_that_is_missing_or_wrong_is_one_line(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with live_service(redis_url, tmp_path, keys=True) as it:
            for code, more in ((1, []), (1, ["--api-key", "old"]), (2, ["--api-key", "é"])):
                assert await lumina(it, ["x", "-o", str(tmp_path / "a.png"), *more]) == code
                line = capsys.readouterr().err
                assert line.startswith("lumina: ")
                assert line.count("\n") == 1
                assert ("(--api-key or LUMINA_API_KEY)" in line) == (code == 1)

    asyncio.run(main())


def test_without_the_extra_it_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "server.client", None)
    argv = ["generate", "x", "-o", str(tmp_path / "a.png"), "--url", "http://127.0.0.1:1"]
    assert cli.main(argv) == 1
    assert "pip install '.[client]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ctrl_c_cancels_the_job(redis_url: str, tmp_path: Path) -> None:
    async def scenario(it: Service) -> None:
        argv = [sys.executable, "-m", "server.cli", "generate", "hang", "--url"]
        argv += [str(it.client.base_url), "-o", str(tmp_path / "a.png")]
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=ROOT, env=dict(os.environ), stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        # What a shell starts in the background ignores SIGINT, and so would its children.
        jobs: list[dict[str, Any]] = []
        async with asyncio.timeout(60):
            while not any(job["status"] == "running" for job in jobs):
                await asyncio.sleep(0.05)
                jobs = (await it.client.get("/jobs")).json()["jobs"]
            process.send_signal(signal.SIGINT)
            _, errors = await process.communicate()
        assert (process.returncode, errors) == (130, b"")
        (job,) = (await it.client.get("/jobs")).json()["jobs"]
        assert job["status"] == "canceled"

    run(redis_url, tmp_path, scenario)
    assert not (tmp_path / "a.png").exists()
