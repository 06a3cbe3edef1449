"""The `lumina` command: what it accepts, its exit codes, and one line for every error."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image

from server import cli
from server.api.address import is_loopback
from server.protocol import DEFAULT_POOL, PNG_TEXT_KEY
from server.queue.jobs import open_queue
from tests.certificates import make_signing
from tests.server.fake_worker import MODEL, service_settings
from tests.tiny_checkpoint import make_tiny_checkpoint, write_generation_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    write_generation_config(
        folder,
        defaults={"num_inference_steps": 2},
        limits={"min_size": 32, "max_size": 128, "max_steps": 50},
        presets={"quick": {"num_inference_steps": 1}},
    )
    return folder


def one_line(capsys: Capture) -> str:
    """What went to stderr, which must be a single line of ours."""
    text = capsys.readouterr().err
    assert text.startswith("lumina: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    return text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["servee"], ["servee"]),
        (["serve", "--colour", "red"], ["--colour"]),
        (["serve", "--port", "x"], ["--port"]),
        (["serve", "--port", "70000"], ["--port"]),
        (["serve", "--workers", "0"], ["--workers"]),
        (["serve", "--model", "/no/such/folder"], ["/no/such/folder"]),
        (["worker", "--model", ".", "--pool", "a b"], ["--pool 'a b'"]),
        (["worker", "--model", ".", "--drain-s", "-1"], ["--drain-s"]),
        (["worker", "--model", ".", "--compile", "fast"], ["LUMINA_COMPILE", "'full'", "'fast'"]),
        (["serve", "--model", ".", "--quantize", "int8"], ["LUMINA_QUANTIZE", "'fp8'", "'int8'"]),
        (["generate"], ["prompt"]),
        (["generate", "x", "-o", "a.gif", "--model", "."], ["a.gif", ".png"]),
        (["generate", "x", "-o", "/no/where/a.png", "--model", "."], ["/no/where"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--seed", "1.5"], ["--seed"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--width", "100"], ["width 100"]),
        (["generate", "", "-o", "a.png", "--model", "."], ["prompt"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "sampler"], ["FIELD=VALUE"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "sampler=heun"], ["'dpm'"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "shft=3"], ["'shift'"]),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "shift=null"], ["shift None"]),
        (
            ["generate", "x", "-o", "a.png", "--model", ".", "--width", "64", "--set", "width=64"],
            ["width", "twice"],
        ),
        (
            ["generate", "x", "-o", "a.png", "--model", ".", "--set", "sigmas=1,0.5"],
            ["[1, 0.7, 0.3]"],
        ),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "loras=ink:0.8"], ['[{"name":']),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "panel=left"], ['{"position":']),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "prompt=y"], ["--set prompt:"]),
        (
            ["generate", "x", "-o", "a.png", "--model", ".", "--set", "num_images=2"],
            ["one picture"],
        ),
        (["generate", "x", "-o", "a.png", "--model", ".", "--set", "seed=-1"], ["seed -1"]),
        (["inspect", "/no/such/file"], ["/no/such/file"]),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    argv: list[str], words: list[str], capsys: Capture
) -> None:
    assert cli.main(argv) == 2
    line = one_line(capsys)
    for word in words:
        assert word in line


def test_an_unknown_setting_is_misuse(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("LUMINA_REDIS_ULR", "x")
    assert cli.main(["api"]) == 2
    assert "LUMINA_REDIS_ULR" in one_line(capsys)


def test_keys_cannot_be_both_required_and_waived(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("LUMINA_API_KEYS", "required")
    for command in ("api", "serve"):
        assert cli.main([command, "--insecure"]) == 2
        assert "LUMINA_API_KEYS=required" in one_line(capsys)


def test_help_and_version(capsys: Capture) -> None:
    for argv in ([], ["--help"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        for command in ("serve", "api", "worker", "generate", "inspect"):
            assert command in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lumina-serve ")


def test_help_and_api_load_no_torch() -> None:
    code = (
        "import sys\nfrom server.cli import main\nmain(['--help'])\n"
        "import server.api.main\n"
        "sys.exit(1 if {'torch', 'model'} & sys.modules.keys() else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line_and_exit_code_1(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "model_index.json" in one_line(capsys)
    argv = ["generate", "x", "-o", str(tmp_path / "a.png"), "--model", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "model_index.json" in one_line(capsys)
    with pytest.raises(ValueError, match=r"model_index\.json"):
        cli.main(["--debug", "inspect", str(tmp_path)])
    with pytest.raises(ValueError, match=r"model_index\.json"):
        cli.main(["inspect", str(tmp_path), "--debug"])


@pytest.mark.slow
def test_generate_draws_the_same_picture_twice(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        argv = [
            "generate", "a red circle", "-o", str(file), "--model", str(checkpoint),
            "--seed", "5", "--width", "48", "--height", "32", "--steps", "3",
            "--guidance-scale", "2", "--negative-prompt", "blue",
        ]  # fmt: skip
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "48x32, seed 5, 3 steps (6 evaluations with guidance), " in out
        assert " prompt tokens, " in out
    assert files[0].read_bytes() == files[1].read_bytes()
    with Image.open(files[0]) as picture:
        assert picture.size == (48, 32)
        parameters = json.loads(picture.info[PNG_TEXT_KEY])
    assert parameters["prompt"] == "a red circle"
    assert (parameters["seed"], parameters["num_inference_steps"]) == (5, 3)

    assert cli.main(["inspect", str(files[0])]) == 0
    told = capsys.readouterr().out
    assert "a red circle" in told
    assert "PNG, 48x32" in told


@pytest.mark.slow
def test_generate_signs_or_says_nothing_as_it_is_told(
    checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "a.webp"
    argv = ["generate", "a red circle", "-o", str(picture), "--model", str(checkpoint)]
    assert cli.main([*argv, "--no-parameters"]) == 0
    assert cli.main(["inspect", str(picture)]) == 1
    assert "does not say how it was made" in capsys.readouterr().err
    files = make_signing(tmp_path)
    monkeypatch.setenv("LUMINA_C2PA_CERT", str(files.cert))
    monkeypatch.setenv("LUMINA_C2PA_KEY", str(files.key))
    assert cli.main(argv) == 0
    assert cli.main(["inspect", str(picture)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^prompt +a red circle$", told, re.MULTILINE)
    assert re.search(r"^C2PA +signature and content agree", told, re.MULTILINE)
    monkeypatch.setenv("LUMINA_C2PA_KEY", str(files.other_key))
    assert cli.main(argv) == 2
    assert "cannot be signed" in one_line(capsys)


@pytest.mark.slow
def test_generate_with_a_preset(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["generate", "x", "-o", str(tmp_path / "a.jpg"), "--model", str(checkpoint)]
    assert cli.main([*argv, "--preset", "quick"]) == 0
    assert ", 1 steps" in capsys.readouterr().out
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.format == "JPEG"
    assert cli.main([*argv, "--preset", "slow"]) == 2
    assert "'quick'" in one_line(capsys)


@pytest.mark.slow
def test_inspect_a_checkpoint(checkpoint: Path, capsys: Capture) -> None:
    assert cli.main(["inspect", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "32 to 128 pixels in steps of 16" in told
    assert "manifest" in told
    assert "num_inference_steps 2" in told
    lines = {line[:17].strip(): line for line in told.splitlines()}
    assert "sampler midpoint" in lines["preset official"]
    assert "sampler euler" in lines["preset diffusers"]
    assert lines["preset quick"].endswith("num_inference_steps 1")
    assert "256, of which the template takes: base " in lines["prompt tokens"]
    assert re.search(r"^attention +sdpa$", told, re.MULTILINE)
    assert re.search(r"^precision +fp32$", told, re.MULTILINE)


@pytest.mark.slow
def test_generate_in_another_precision(
    checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.png" for name in ("fp32", "option", "variable")]
    argv = ["generate", "x", "--model", str(checkpoint), "--seed", "1", "--width", "32"]
    assert cli.main([*argv, "-o", str(files[0])]) == 0
    assert cli.main([*argv, "-o", str(files[1]), "--precision", "mixed"]) == 0
    monkeypatch.setenv("LUMINA_PRECISION", "mixed")
    assert cli.main([*argv, "-o", str(files[2])]) == 0
    first, option, variable = (file.read_bytes() for file in files)
    assert first != option == variable
    capsys.readouterr()
    assert cli.main([*argv, "-o", str(files[0]), "--precision", "fp8"]) == 2
    assert "LUMINA_PRECISION: Input should be 'auto', 'fp32', 'bf16' or 'mixed'" in one_line(capsys)


def test_an_attention_backend_that_cannot_be_forced_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUMINA_ATTENTION", "flash")
    argv = ["generate", "x", "-o", str(tmp_path / "a.png"), "--model", str(checkpoint)]
    assert cli.main(argv) == 1
    assert "LUMINA_ATTENTION 'flash' is not allowed here: give " in one_line(capsys)


def test_inspect_pictures_that_say_nothing(tmp_path: Path, capsys: Capture) -> None:
    plain, broken = tmp_path / "plain.png", tmp_path / "broken.png"
    Image.new("RGB", (8, 8)).save(plain)
    broken.write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    for file, words in [(plain, "does not say"), (broken, "not a picture")]:
        assert cli.main(["inspect", str(file)]) == 1
        assert words in one_line(capsys)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("LocalHost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False),
    ],
)  # fmt: skip
def test_loopback_addresses(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_taken_port_is_one_line_and_exit_code_1(redis_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = [sys.executable, "-m", "server.cli", "api", "--port", port]
        env = {**os.environ, "LUMINA_DATA_DIR": str(tmp_path), "LUMINA_REDIS_URL": redis_url}
        done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_api_process_ends_in_order_while_a_caller_waits(redis_url: str, tmp_path: Path) -> None:
    """SIGTERM: the waiting caller gets a 202 and its job lives on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "server.cli", "api", "--port", str(port)]
    env = {**os.environ, "LUMINA_DATA_DIR": str(tmp_path)}
    process = subprocess.Popen([*argv, "--redis-url", redis_url], env=env)
    try:
        answer = asyncio.run(_wait_while_it_stops(port, process, redis_url, tmp_path))
        assert answer.status_code == 202
        assert answer.json()["status"] == "queued"
        assert process.wait(10) == 0
    finally:
        process.kill()


async def _wait_while_it_stops(
    port: int, process: "subprocess.Popen[bytes]", redis_url: str, folder: Path
) -> httpx.Response:
    queue = open_queue(service_settings(redis_url, folder))
    await queue.publish_model(DEFAULT_POOL, MODEL)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        await _until_alive(client)
        foreign = await client.get("/livez", headers={"host": "evil.example"})
        assert foreign.status_code == 403
        waiting = asyncio.create_task(client.post("/generate", json={"prompt": "x"}))
        while await queue.depth() == 0:
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        answer = await waiting
    await queue.close()
    return answer


async def _until_alive(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if (await client.get("/livez")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.05)
    raise AssertionError("the API did not come up")
