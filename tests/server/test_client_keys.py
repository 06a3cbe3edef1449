"""Our Python client, OpenAI's and `lumina generate --url` where a service asks for API keys."""

import asyncio
from pathlib import Path

import openai
import pytest

from server import cli
from server.client import AsyncClient, Client, Missing, NotAllowed, TooManyRequests
from server.queue.api_keys import KeyRing
from tests.server.live import live_service


def test_a_client_with_a_key_can_do_everything(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, keys=True) as it:
            ring, url = KeyRing(it.queue), str(it.client.base_url)
            key, text = await ring.create(rate=4, daily_jobs=3)
            _, others = await ring.create()
            async with (
                AsyncClient(url, api_key=text) as client,
                AsyncClient(url, api_key=others) as other,
                AsyncClient(url) as nobody,
            ):
                with pytest.raises(NotAllowed):
                    await nobody.submit("x")
                job = await client.generate("x", num_images=2)
                assert "signature=" in job.images[0].url
                assert (await client.picture(job.images[1])).size == (128, 128)
                # Whoever has the URL may see the picture, and nothing else.
                assert await nobody.fetch(job.images[0]) == await client.fetch(job.images[0])
                with pytest.raises(NotAllowed):
                    await nobody.job(job.id)
                for theirs in (other.job, other.cancel, other.delete, other.wait):
                    with pytest.raises(Missing):
                        await theirs(job.id)
                hanging = await client.submit("hang")
                assert [each.id async for each in client.jobs(limit=1)] == [hanging.id, job.id]
                assert (await client.cancel(hanging.id)).status in ("running", "canceled")
                assert (await client.wait(hanging.id, timeout_s=30)).status == "canceled"
                await client.delete(job.id)
                usage = await client.usage()
                assert (usage["key"], usage["requests"]["used"]) == (key.id, 2)
                assert usage["jobs_today"]["remaining"] == 1
                assert (await client.presets())["model"] == "demo"
                await client.submit("x")
                with pytest.raises(TooManyRequests) as refused:  # a minute's wait is the caller's
                    async with AsyncClient(url, api_key=text, max_retries=0) as hasty:
                        await hasty.submit("x")
                assert refused.value.code == "rate-limited"

    asyncio.run(scenario())


def test_the_command_line_sends_a_key(
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, keys=True) as it:
            _, text = await KeyRing(it.queue).create()

            async def lumina(*more: str) -> int:
                argv = ["generate", "x", "-o", str(tmp_path / "a.png"), "--url"]
                return await asyncio.to_thread(cli.main, [*argv, str(it.client.base_url), *more])

            assert await lumina() == 1
            line = capsys.readouterr().err
            assert line.endswith(" (--api-key or LUMINA_API_KEY)\n")
            assert line.count("\n") == 1
            assert await lumina("--api-key", "a b") == 2
            assert "api_key must be" in capsys.readouterr().err
            assert await lumina("--api-key", text) == 0
            monkeypatch.setenv("LUMINA_API_KEY", text + "\n")
            assert await lumina() == 0
            assert text not in capsys.readouterr().out

    asyncio.run(scenario())


def test_a_synchronous_client_has_its_key_too(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, keys=True) as it:
            _, text = await KeyRing(it.queue).create()

            def call() -> list[str]:
                with Client(str(it.client.base_url), api_key=text) as client:
                    job = client.generate("x")
                    assert client.picture(job.images[0]).size == (128, 128)
                    return [event.type for event in client.watch(job.id)]

            assert (await asyncio.to_thread(call))[-1] == "succeeded"

    asyncio.run(scenario())


def test_the_openai_client_has_its_key_too(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with live_service(redis_url, tmp_path, keys=True) as it:
            _, text = await KeyRing(it.queue).create()
            url = f"{it.client.base_url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key=text) as client:
                stream = await client.images.generate(prompt="x", stream=True, partial_images=1)
                assert [event.type.split(".")[1] async for event in stream] == [
                    "partial_image", "completed"
                ]  # fmt: skip
                assert [model.id async for model in client.models.list()] == ["demo"]
            async with openai.AsyncOpenAI(base_url=url, api_key="lumina_wrong") as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    await client.images.generate(prompt="x")
                assert caught.value.code == "invalid_api_key"

    asyncio.run(scenario())
