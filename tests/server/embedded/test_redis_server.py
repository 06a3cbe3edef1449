import os
import signal
import stat
from pathlib import Path

import pytest
from redis import Redis

from server.embedded import redis_server
from server.embedded.redis_server import EmbeddedRedis, find_redis_server
from server.errors import ServiceError
from tests.fakes import wait_until


def fake_binary(folder, version):
    folder.mkdir()
    path = folder / "redis-server"
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=0'\n")
    path.chmod(0o755)
    return path


def test_a_newer_server_on_path_wins_and_an_older_one_does_not(tmp_path, monkeypatch):
    bundled = find_redis_server()
    newer = fake_binary(tmp_path / "newer", "99.0.1")
    older = fake_binary(tmp_path / "older", "2.8.0")
    monkeypatch.setenv("PATH", f"{newer.parent}:{os.environ['PATH']}")
    assert find_redis_server() == newer
    monkeypatch.setenv("PATH", str(older.parent) + ":/usr/bin:/bin")
    assert find_redis_server() != older
    assert bundled.is_file()


def test_no_server_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match=r"no redis-server 6\.2 or newer"):
        find_redis_server()


def test_data_survive_a_kill_and_a_restart(tmp_path):
    server = EmbeddedRedis(tmp_path)
    server.start()
    socket = Path(server.url.removeprefix("unix://"))
    try:
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        with Redis.from_url(server.url) as client:
            client.set("k", "v")
        server.child.signal(signal.SIGKILL)
        wait_until(lambda: not server.child.running)
        server.start()
        with Redis.from_url(server.url) as client:
            assert client.get("k") == b"v"
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    finally:
        server.stop()
    assert not socket.parent.exists()


def test_the_socket_of_a_killed_run_is_cleared_away(tmp_path):
    killed = EmbeddedRedis(tmp_path)
    folder = Path(killed.url.removeprefix("unix://")).parent
    assert folder.is_dir()
    after = EmbeddedRedis(tmp_path)  # nobody has stopped the first
    assert not folder.exists()
    assert Path(after.url.removeprefix("unix://")).parent.is_dir()
    after.stop()
    (tmp_path / "redis" / "socket-folder").write_text(str(tmp_path))  # never anything else
    EmbeddedRedis(tmp_path).stop()
    assert tmp_path.is_dir()


def test_a_server_that_cannot_start_says_where_to_look(tmp_path):
    server = EmbeddedRedis(tmp_path)
    (tmp_path / "redis" / "appendonly.aof").write_bytes(b"*9\r\nnonsense that no server wrote\r\n")
    with pytest.raises(ServiceError, match=r"redis\.log"):
        server.start()
