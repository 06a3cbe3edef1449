"""Bad input: every refusal is a problem with one clear sentence, and the service goes on."""

import asyncio
import json
import socket
import time
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from server.api.app import create_app
from server.api.problems import TITLES, TYPE_PREFIX
from server.api.schemas import MAX_SEED
from tests.server.fake_worker import Service, service, service_settings

JSON = {"content-type": "application/json"}

# (body, status, field at fault, words of the sentence)
BAD_BODIES = [
    ({}, 422, "prompt", ["prompt is required"]),
    ({"prompt": ""}, 422, "prompt", ["1 to 4096 characters", '""']),
    ({"prompt": " \n\t"}, 422, "prompt", ["not blank"]),
    ({"prompt": None}, 422, "prompt", ["null"]),
    ({"prompt": 5}, 422, "prompt", ["got 5"]),
    ({"prompt": ["a"]}, 422, "prompt", ['["a"]']),
    ({"prompt": "x" * 4097}, 422, "prompt", ["4096", "a text of 4097 characters"]),
    ({"prompt": "a\0b"}, 422, "prompt", ["NUL"]),
    ({"prompt": "x", "negative_prompt": "\0"}, 422, "negative_prompt", ["NUL"]),
    ({"prompt": "x", "negative_prompt": "y" * 4097}, 422, "negative_prompt", ["4097"]),
    ({"promt": "x"}, 422, "promt", ["unknown field 'promt'; did you mean 'prompt'?"]),
    ({"prompt": "x", "heigth": 64}, 422, "heigth", ["did you mean 'height'"]),
    ({"prompt": "x", "Width": 64}, 422, "Width", ["did you mean 'width'"]),
    ({"prompt": "x", "steps": 4}, 422, "steps", ["did you mean 'num_inference_steps'"]),
    ({"prompt": "x", "zzz": 4}, 422, "zzz", ["unknown field 'zzz'; known are prompt, "]),
    ({"prompt": "x", "width": 100}, 422, "width", ["multiple of 16", "got 100"]),
    ({"prompt": "x", "width": 48}, 422, "width", ["from 64 to 128", "got 48"]),
    ({"prompt": "x", "height": 144}, 422, "height", ["from 64 to 128", "got 144"]),
    ({"prompt": "x", "height": 1 << 40}, 422, "height", ["from 64 to 128"]),
    ({"prompt": "x", "width": 0}, 422, "width", ["got 0"]),
    ({"prompt": "x", "width": -64}, 422, "width", ["got -64"]),
    ({"prompt": "x", "width": "128"}, 422, "width", ['got "128"']),
    ({"prompt": "x", "width": 64.0}, 422, "width", ["whole number", "64.0"]),
    ({"prompt": "x", "width": True}, 422, "width", ["got true"]),
    ({"prompt": "x", "num_inference_steps": 0}, 422, "num_inference_steps", ["got 0"]),
    ({"prompt": "x", "num_inference_steps": 51}, 422, "num_inference_steps", ["1 to 50"]),
    ({"prompt": "x", "num_inference_steps": 10**30}, 422, "num_inference_steps", ["1 to 50"]),
    ({"prompt": "x", "num_inference_steps": 2.5}, 422, "num_inference_steps", ["2.5"]),
    (
        {"prompt": "x", "num_inference_steps": 1, "time_grid": "official"},
        422, "num_inference_steps", ["at least 2"],
    ),
    ({"prompt": "x", "width": 16 * 10**3000}, 422, "width", ["from 64 to 128"]),
    ({f"promp{k}": k for k in range(3000)}, 422, "promp0", ["did you mean 'prompt'"]),
    ({"prompt": "x", "seed": -1}, 422, "seed", [f"0 to {MAX_SEED}", "got -1"]),
    ({"prompt": "x", "seed": MAX_SEED + 1}, 422, "seed", [str(MAX_SEED + 1)]),
    ({"prompt": "x", "seed": "1"}, 422, "seed", ['got "1"']),
    ({"prompt": "x", "seed": 1.5}, 422, "seed", ["1.5"]),
    ({"prompt": "x", "num_images": 0}, 422, "num_images", ["1 to 8"]),
    ({"prompt": "x", "num_images": 9}, 422, "num_images", ["1 to 8", "got 9"]),
    ({"prompt": "x", "guidance_scale": "nan"}, 422, "guidance_scale", ['got "nan"']),
    ({"prompt": "x", "guidance_scale": -1}, 422, "guidance_scale", ["0 to 50"]),
    ({"prompt": "x", "guidance_scale": False}, 422, "guidance_scale", ["false"]),
    ({"prompt": "x", "shift": 0}, 422, "shift", ["greater than 0"]),
    ({"prompt": "x", "cfg_trunc_ratio": 2}, 422, "cfg_trunc_ratio", ["0 to 1"]),
    ({"prompt": "x", "cfg_trunc_ratio": 1, "cfg_trunc_t": 1}, 422, "cfg_trunc_t", ["only one"]),
    ({"prompt": "x", "cfg_renorm": "col"}, 422, "cfg_renorm", ["'none', 'global' or 'row'"]),
    ({"prompt": "x", "cfg_renorm_scale": 0}, 422, "cfg_renorm_scale", ["greater than 0"]),
    ({"prompt": "x", "cache": "turbo"}, 422, "cache", ["'off', 'balanced', 'fast' or a number"]),
    ({"prompt": "x", "cache": -0.1}, 422, "cache", ["0 to 10", "got -0.1"]),
    ({"prompt": "x", "cache": 11}, 422, "cache", ["0 to 10", "got 11"]),
    ({"prompt": "x", "cache": True}, 422, "cache", ["got true"]),
    ({"prompt": "x", "cache": "0.3"}, 422, "cache", ['got "0.3"']),
    ({"prompt": "x", "time_grid": "linear"}, 422, "time_grid", ["'diffusers' or 'official'"]),
    ({"prompt": "x", "sampler": "heun"}, 422, "sampler", ["'euler', 'midpoint'", '"heun"']),
    ({"prompt": "x", "sampler": "dpm", "time_grid": "official"}, 422, "time_grid", ["has its own"]),
    ({"prompt": "x", "time_grid": "official", "preset": "flow"}, 422, "time_grid", ["'dpm'"]),
    ({"prompt": "x", "loras": "ink"}, 422, "loras", ["at most 8 objects", '"ink"']),
    ({"prompt": "x", "loras": [{"scale": 1}]}, 422, "loras", ["different name"]),
    ({"prompt": "x", "loras": [{"name": ""}]}, 422, "loras", ["different name"]),
    ({"prompt": "x", "loras": [{"name": "ink", "scale": "1"}]}, 422, "loras", ["-10 to 10"]),
    ({"prompt": "x", "loras": [{"name": "ink", "scale": 11}]}, 422, "loras", ["-10 to 10"]),
    ({"prompt": "x", "loras": [{"name": "ink", "weight": 1}]}, 422, "loras", ["scale"]),
    ({"prompt": "x", "loras": [{"name": "ink"}] * 2}, 422, "loras", ["each LoRA once"]),
    ({"prompt": "x", "loras": [{"name": f"{k}"} for k in range(9)]}, 422, "loras", ["at most 8"]),
    (
        {"prompt": "x", "loras": [{"name": "wool"}, {"name": "oil"}]},
        422, "loras", ["demo has (ink, wool)", 'got "oil"'],
    ),
    ({"prompt": "x", "loras": [{"name": "../ink"}]}, 422, "loras", ["(ink, wool)"]),
    ({"prompt": "x", "sigmas": []}, 422, "sigmas", ["1 to 1000 numbers", "got []"]),
    ({"prompt": "x", "sigmas": [0.5, 1]}, 422, "sigmas", ["below the one before", "[0.5, 1"]),
    ({"prompt": "x", "sigmas": [1.5, 1]}, 422, "sigmas", ["the first at most 1"]),
    ({"prompt": "x", "sigmas": [1, 0]}, 422, "sigmas", ["above 0"]),
    ({"prompt": "x", "sigmas": [1, "0.5"]}, 422, "sigmas", ['"0.5"']),
    ({"prompt": "x", "sigmas": 1}, 422, "sigmas", ["got 1"]),
    ({"prompt": "x", "sigmas": [1 - k / 100 for k in range(51)]}, 422, "sigmas", ["at most 50"]),
    (
        {"prompt": "x", "sigmas": [1], "num_inference_steps": 4},
        422, "num_inference_steps", ["beside sigmas"],
    ),
    ({"prompt": "x", "sigmas": [1], "shift": 4.0}, 422, "shift", ["beside sigmas"]),
    ({"prompt": "x", "negative_template": 1}, 422, "negative_template", ["true or false"]),
    ({"prompt": "x", "panel": {"position": "top"}}, 422, "panel", ["'lower half'", '"top"']),
    ({"prompt": "x", "panel": {"content": "a\0"}}, 422, "panel", ["NUL"]),
    ({"prompt": "x", "panel": {"contents": "x"}}, 422, "panel", ["position", "content"]),
    ({"prompt": "x", "panel": {}, "system_prompt": "real"}, 422, "panel", ["system_prompt"]),
    ({"prompt": "x", "preset": "faast"}, 422, "preset", ["(fast, flow)", '"faast"']),
    ({"prompt": "x", "output_format": "gif"}, 422, "output_format", ["'png', 'jpeg' or 'webp'"]),
    ({"prompt": "x", "quality": 101}, 422, "quality", ["1 to 100"]),
    ({"prompt": "x", "priority": "urgent"}, 422, "priority", ["'low', 'normal' or 'high'"]),
    ({"prompt": "x", "metadata": [1]}, 422, "metadata", ["object"]),
    ({"prompt": "x", "metadata": {"a": {"b": 1}}}, 422, "metadata", ["object"]),
    ({"prompt": "x", "metadata": {"": 1}}, 422, "metadata", ["object"]),
    ({"prompt": "x", "metadata": {str(k): k for k in range(17)}}, 422, "metadata", ["16 entries"]),
    ({"prompt": "x", "model": "other"}, 422, None, ["model must be", "(demo)", "'other'"]),
    ([], 422, None, ["JSON object", "got []"]),
    ("prompt", 422, None, ["JSON object"]),
]  # fmt: skip

# (raw body, content type, status, code, words)
BAD_BYTES = [
    (b"", "application/json", 400, "malformed-body", ["not JSON"]),
    (b"null", "application/json", 422, "invalid-request", ["JSON object", "null"]),
    (b"{", "application/json", 400, "malformed-body", ["line 1, column 2"]),
    (b'{"prompt": "x", "guidance_scale": NaN}', "application/json", 400, "malformed-body", ["NaN"]),
    (b'{"prompt":"x","shift":-Infinity}', "application/json", 400, "malformed-body", ["Infinity"]),
    (b'{"prompt":"x","shift":1e999}', "application/json", 422, "invalid-request", ["shift must"]),
    (b'{"prompt":"\xff"}', "application/json", 400, "malformed-body", ["UTF-8"]),
    (b'{"prompt":"\\ud800"}', "application/json", 422, "invalid-request", ["surrogates"]),
    (b'{"prompt":"x","\\ud800":1}', "application/json", 422, "invalid-request", ["unknown field"]),
    (
        b'{"prompt":"x","metadata":{"a":"\\udfff"}}', "application/json",
        422, "invalid-request", ["metadata"],
    ),
    (b'{"prompt":"x","prompt":"y"}', "application/json", 400, "malformed-body", ["twice"]),
    (b"[" * 60_000, "application/json", 400, "malformed-body", ["nested too deeply"]),
    (b'{"seed":' + b"9" * 5000 + b"}", "application/json", 400, "malformed-body", ["digits"]),
    (b'{"prompt":"x"}', "text/plain", 415, "not-json", ["application/json", "text/plain"]),
    (b'{"prompt":"x"}', "", 415, "not-json", ["application/json"]),
    (b"prompt=x", "application/x-www-form-urlencoded", 415, "not-json", ["urlencoded"]),
    (b" " * 70_000, "application/json", 413, "body-too-large", ["65536 bytes"]),
]  # fmt: skip


def assert_problem(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, str]:
    """The answer is a well-formed problem; returns its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, str] = answer.json()
    assert body["status"] == status
    assert body["type"] == TYPE_PREFIX + body["code"]
    assert body["title"] == TITLES[body["code"]]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["detail"]
    assert "\n" not in body["detail"]
    assert "Traceback" not in answer.text
    assert len(body["detail"]) < 500
    if code is not None:
        assert body["code"] == code
    return body


async def assert_works(it: Service) -> None:
    answer = await it.generate({"prompt": "a red circle", "num_inference_steps": 1})
    assert answer.status_code == 200


def test_bad_bodies_are_refused_in_one_sentence(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for body, status, field, words in BAD_BODIES:
                answer = await it.generate(body)
                problem = assert_problem(answer, status)
                for word in words:
                    assert word in problem["detail"], body
                if field is not None:
                    assert problem["errors"][0]["field"] == field, body  # type: ignore[index]
            assert await it.queue.redis.keys("{lumina}:job:*") == []
            await assert_works(it)

    asyncio.run(scenario())


def test_bytes_that_are_no_request(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for data, content_type, status, code, words in BAD_BYTES:
                headers = {"content-type": content_type} if content_type else {}
                answer = await it.client.post("/generate", content=data, headers=headers)
                problem = assert_problem(answer, status, code)
                for word in words:
                    assert word in problem["detail"], data[:50]
            await assert_works(it)

    asyncio.run(scenario())


def test_a_body_that_hides_its_length_is_cut_off(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        sent = 0

        async def endless():  # type: ignore[no-untyped-def]
            nonlocal sent
            while sent < 10_000_000:
                sent += 10_000
                yield b" " * 10_000

        async with service(redis_url, tmp_path) as it:
            answer = await it.client.post("/generate", content=endless(), headers=JSON)
            assert_problem(answer, 413, "body-too-large")

    asyncio.run(scenario())


def test_all_wrong_fields_are_listed(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            answer = await it.generate({"width": "a", "seed": -1, "sede": 1})
            errors = assert_problem(answer, 422)["errors"]
            found = {error["field"] for error in errors}  # type: ignore[index]
            assert found == {"prompt", "width", "seed", "sede"}

    asyncio.run(scenario())


def test_edges_that_are_allowed(redis_url: str, tmp_path: Path) -> None:
    bodies = [
        {"prompt": "x" * 4096},
        {"prompt": "猫 🐈 \u202e ü", "negative_prompt": "", "system_prompt": "real"},
        {"prompt": "x", "width": 64, "height": 128, "num_inference_steps": 50, "preset": "fast"},
        {"prompt": "x", "seed": MAX_SEED, "num_images": 8, "guidance_scale": 4},
        {"prompt": "x", "model": "demo", "seed": None, "priority": "high", "quality": 90},
        {"prompt": "x", "cfg_trunc_ratio": 1, "cfg_renorm": "none", "cfg_renorm_scale": 1.0},
        {"prompt": "x", "shift": 6, "time_grid": "official", "cfg_trunc_t": 0.5},
        {"prompt": "x", "sampler": "midpoint", "num_inference_steps": 50, "preset": "flow"},
        {"prompt": "x", "sigmas": [1 - k / 100 for k in range(50)], "sampler": "dpm"},
        {"prompt": "x", "cache": "balanced"},
        {"prompt": "x", "cache": 0.25},
        {"prompt": "x", "cache": 1},
        {"prompt": "x", "panel": {"content": "edge map"}, "negative_template": True},
        {"prompt": "x", "panel": {"position": "left half"}, "system_prompt": "panel"},
    ]

    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for body in bodies:
                answer = await it.generate(body)
                assert answer.status_code == 200, answer.text
            typed = {"content-type": "Application/JSON; charset=utf-8"}
            raw = json.dumps(bodies[1]).encode()
            assert (await it.client.post("/generate", content=raw, headers=typed)).is_success

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/ui/nothing.js", 404, "not-found"),
        ("GET", "/ui/../app.py", 404, "not-found"),
        ("GET", "/ui/%2e%2e/app.py", 404, "not-found"),
        ("GET", "/jobs/", 404, "not-found"),
        ("GET", "/jobs/unknown", 404, "not-found"),
        ("GET", "/jobs/" + "0" * 26, 404, "not-found"),
        ("GET", "/jobs/%00%0a..%2f", 404, "not-found"),
        ("POST", "/jobs/" + "0" * 26 + "/cancel", 404, "not-found"),
        ("GET", "/jobs/" + "0" * 26 + "/images/0", 404, "not-found"),
        ("GET", "/generate", 405, "method-not-allowed"),
        ("PATCH", "/jobs/" + "0" * 26, 405, "method-not-allowed"),
        ("POST", "/livez", 405, "method-not-allowed"),
    ],
)
def test_unknown_places(
    redis_url: str, tmp_path: Path, method: str, path: str, status: int, code: str
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            answer = await it.client.request(method, path)
            assert_problem(answer, status, code)
            assert ("allow" in answer.headers) == (status == 405)

    asyncio.run(scenario())


def test_malformed_ranges_are_ignored(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            for path in ("/", "/ui/index.html", "/docs"):
                for value in ("nonsense", "bytes=5-1", "bytes=999999-"):
                    answer = await it.client.get(path, headers={"range": value})
                    assert answer.status_code == 200, (path, value)

    asyncio.run(scenario())


def test_an_unexpected_error_tells_nothing_but_its_id(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:

            @it.app.get("/broken")
            async def broken() -> None:
                raise KeyError("a secret")

            with capture_logs() as logs:
                answer = await it.client.get("/broken", headers={"x-request-id": "mine-1"})
            assert [line["log_level"] for line in logs] == ["error", "info"]
            problem = assert_problem(answer, 500, "internal")
            assert problem["request_id"] == "mine-1"
            assert "secret" not in answer.text
            await assert_works(it)

    asyncio.run(scenario())


def test_request_ids(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path) as it:
            for sent, echoed in [("abc-1.2", True), ("a b", False), ("x" * 129, False)]:
                answer = await it.client.get("/livez", headers={"x-request-id": sent})
                assert (answer.headers["x-request-id"] == sent) is echoed
            ids = {(await it.client.get("/livez")).headers["x-request-id"] for _ in range(3)}
            assert len(ids) == 3
            page = await it.client.get("/")
            assert page.headers["x-request-id"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("127.0.0.2:8000", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("[", False),
        ("", False),
    ],
)
def test_only_loopback_names_reach_a_local_service(
    redis_url: str, tmp_path: Path, host: str, allowed: bool
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False, loopback_only=True) as it:
            answer = await it.client.get("/livez", headers={"host": host})
            if allowed:
                assert answer.status_code == 200
            else:
                assert_problem(answer, 403, "foreign-host")

    asyncio.run(scenario())


def test_redis_away_is_a_503_within_a_second(tmp_path: Path) -> None:
    """Refused connections, and a server that accepts them and never says a word."""

    async def scenario(redis_url: str) -> None:
        app = create_app(service_settings(redis_url, tmp_path))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for method, path in [
                ("POST", "/generate"),
                ("GET", "/jobs/" + "0" * 26),
                ("GET", "/readyz"),
            ]:
                taken = []
                while len(taken) < 3 and (not taken or min(taken) >= 1.0):  # a busy machine
                    began = time.monotonic()
                    answer = await client.request(method, path, json={"prompt": "x"})
                    taken.append(time.monotonic() - began)
                problem = assert_problem(answer, 503, "queue-unavailable")
                assert min(taken) < 1.0
                assert "retry-after" in answer.headers
                assert "127.0.0.1" not in problem["detail"]
            assert (await client.get("/livez")).status_code == 200
        await app.state.context.queue.close()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        asyncio.run(scenario(f"redis://127.0.0.1:{port}/0"))
    asyncio.run(scenario(f"redis://127.0.0.1:{port}/0"))
