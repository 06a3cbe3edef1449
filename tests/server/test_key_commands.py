"""`lumina keys` on a real Redis, and on a data directory before, while and after it is served."""

import asyncio
import json

import pytest
from redis import Redis

from server import cli
from server.embedded.data_dir import borrowed_redis
from server.queue.api_keys import KeyRing
from server.queue.connection import connect
from server.queue.jobs import JobQueue


@pytest.fixture
def lumina(capsys):
    """Run `lumina keys`; returns its exit code, what it printed and what it complained."""

    def run(*argv):
        code = cli.main(["keys", *argv])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def found(redis_url, text):
    async def main():
        queue = JobQueue(connect(redis_url))
        try:
            return await KeyRing(queue).find(text)
        finally:
            await queue.close()

    return asyncio.run(main())


def test_a_key_is_printed_once_listed_without_secrets_and_revoked(lumina, redis_url):
    here = ("--redis-url", redis_url)
    code, out, err = lumina(
        "create", "--name", "ann", "--tenant", "acme", "--scope", "admin", "--scope", "generate",
        "--rate", "60", "--concurrency", "4", "--daily", "500", "--weight", "3", *here,
    )  # fmt: skip
    assert code == 0
    text = out.strip()
    key = found(redis_url, text)
    assert (key.tenant, key.name, key.scopes) == ("acme", "ann", ("admin", "generate"))
    assert (key.rate, key.open_jobs, key.daily_jobs, key.weight) == (60, 4, 500, 3)
    assert key.webhook_secret in err
    code, out, _ = lumina("list", *here)
    assert out.split()[0] == key.id
    assert "rate=60 concurrency=4 daily=500 weight=3  ann" in out
    assert text not in out
    assert "whsec" not in out
    with Redis.from_url(redis_url) as client:
        kept = b" ".join(client.dump(name) + name for name in client.scan_iter())
    assert key.sha256.encode() in kept
    assert text.removeprefix("lumina_").encode() not in kept
    assert lumina("revoke", key.id, *here)[:2] == (0, f"{key.id}  revoked\n")
    assert found(redis_url, text) is None
    assert lumina("list", *here)[1] == ""
    assert lumina("revoke", key.id, *here)[0] == 1


def test_a_key_as_json(lumina, redis_url):
    code, out, _ = lumina("create", "--json", "--redis-url", redis_url)
    made = json.loads(out)
    assert code == 0
    key = found(redis_url, made["key"])
    assert (key.id, key.webhook_secret) == (made["id"], made["webhook_secret"])
    assert key.tenant == f"key-{key.id}"
    assert key.scopes == ("generate",)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (("--scope", "root"), "generate, admin"), (("--tenant", "a b"), "'a b'"),
        (("--tenant", "a/../b"), "tenant"), (("--weight", "1001"), "1001"),
        (("--webhook-secret", "secret"), "whsec_"), (("--name", "a\nb"), "name"),
    ],
)  # fmt: skip
def test_what_a_key_cannot_be(lumina, redis_url, argv, word):
    code, out, err = lumina("create", *argv, "--redis-url", redis_url)
    assert (code, out) == (2, "")
    assert word in err
    assert lumina("list", "--redis-url", redis_url)[1] == ""


def test_the_first_key_comes_before_the_service(lumina, tmp_path):
    here = ("--data-dir", str(tmp_path))
    code, first, _ = lumina("create", *here)
    assert code == 0
    with borrowed_redis(tmp_path) as url:  # the service runs now, and holds the directory
        assert found(url, first.strip()) is not None
        code, second, _ = lumina("create", *here)
        assert code == 0
        assert found(url, second.strip()) is not None
    assert len(lumina("list", *here)[1].splitlines()) == 2


def test_one_of_the_two_places_must_be_given(lumina, redis_url, monkeypatch, tmp_path):
    code, _, err = lumina("list")
    assert (code, "--data-dir" in err) == (2, True)
    code, _, err = lumina("list", "--redis-url", redis_url, "--data-dir", str(tmp_path))
    assert (code, "either" in err) == (2, True)
    monkeypatch.setenv("LUMINA_REDIS_URL", redis_url)
    assert lumina("list")[0] == 0


@pytest.mark.parametrize("command", [("list",), ("revoke", "3f9a1c20b7de")])
def test_a_misspelt_data_directory_is_not_made(lumina, tmp_path, command):
    absent = tmp_path / "dta"
    code, out, err = lumina(*command, "--data-dir", str(absent))
    assert (code, out, err) == (2, "", f"lumina: --data-dir {absent}: there is no such folder\n")
    assert not absent.exists()


def test_callers_without_a_key_have_one_webhook_secret(lumina, redis_url):
    first, second = (lumina("webhook-secret", "--redis-url", redis_url)[1] for _ in "ab")
    assert first == second
    assert first.startswith("whsec_")


def test_a_key_may_be_given_by_the_environment_as_often_as_one_likes(
    lumina, redis_url, monkeypatch
):
    text = "lumina_" + "a" * 43
    here = ("create", "--from-env", "FIRST", "--redis-url", redis_url)
    code, _, err = lumina(*here)
    assert (code, "FIRST is not set" in err) == (2, True)
    monkeypatch.setenv("FIRST", "a short one")
    code, _, err = lumina(*here)
    assert (code, "256 bits" in err, "a short one" in err) == (2, True, False)
    monkeypatch.setenv("FIRST", text)
    secrets = set()
    for scope in ("generate", "admin"):
        code, out, err = lumina(*here, "--scope", scope)
        assert (code, out) == (0, "")
        assert text not in err
        assert found(redis_url, text).scopes == (scope,)
        # What receivers verify with stays as it was, and is shown only once.
        secrets.add(found(redis_url, text).webhook_secret)
        assert (secrets.copy().pop() in err) == (scope == "generate")
    assert len(secrets) == 1
    assert len(lumina("list", "--redis-url", redis_url)[1].splitlines()) == 1
