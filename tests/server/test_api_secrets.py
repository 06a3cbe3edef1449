"""Nothing that is secret, and nobody's prompt, reaches a log."""

import asyncio
import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from server.log import configure_logging
from tests.server.keyed import keyed
from tests.server.webhook_receiver import receiving, status


@pytest.mark.usefixtures("kept_logging")
def test_logs_hold_no_secret_and_no_prompt(
    redis_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> list[str]:
        settings = {"webhook_allow_cidrs": "127.0.0.0/8"}
        async with (
            keyed(redis_url, tmp_path, settings=settings) as it,
            receiving(status(500), status(204)) as receiver,
        ):
            configure_logging("debug")
            key, client = await it.member(rate=100)
            text = client.headers["authorization"].removeprefix("Bearer ")
            url = f"http://127.0.0.1:{receiver.port}/hook?token=wh-token"
            body = {"prompt": "my-prompt", "negative_prompt": "my-negative", "webhook_url": url}
            drawn = await client.post("/generate", json=body)
            assert drawn.status_code == 200
            shown = drawn.json()["images"][0]["url"]
            assert (await it.anonymous.get(shown)).status_code == 200
            for wrong in ({"prompt": "my-prompt", "stepz": 1}, {"prompt": "my-prompt\0"}):
                assert (await client.post("/generate", json=wrong)).status_code == 422
            failed = {"prompt": "fail my-prompt", "webhook_url": url}
            assert (await client.post("/generate", json=failed)).status_code == 500
            guess = {"authorization": "Bearer my-guess"}
            assert (await client.get("/presets", headers=guess)).status_code == 401
            await receiver.until(2)
            signature = parse_qs(urlsplit(shown).query)["signature"][0]
            return [
                text, "my-prompt", "my-negative", "my-guess", "wh-token", signature,
                key.webhook_secret, key.webhook_secret.removeprefix("whsec_"), "Bearer",
            ]  # fmt: skip

    secrets = asyncio.run(scenario())
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.err.splitlines()]
    assert {"request", "webhook failed"} <= {line["event"] for line in lines}
    for secret in secrets:
        assert secret not in told.err + told.out, secret
