"""The whole API under requests nobody would send; `make chaos` does so for longer (row `fuzz`)."""

from pathlib import Path

import httpx
import pytest

from tests.chaos.fuzz_row import draw
from tests.server.fuzzing import fuzz_anything, fuzz_documented
from tests.server.live import service_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_documented_api_keeps_its_word(redis_url: str, tmp_path: Path) -> None:
    with service_process(redis_url, tmp_path, sync_timeout=2.0) as base_url:
        jobs = [draw(base_url) for _ in range(3)]
        assert fuzz_documented(base_url, 5, 7, jobs) >= 14
        assert httpx.get(f"{base_url}/readyz", trust_env=False).status_code == 200


def test_anything_else_is_refused_in_words(redis_url: str, tmp_path: Path) -> None:
    with service_process(redis_url, tmp_path, sync_timeout=2.0) as base_url:
        fuzz_anything(base_url, 100, 7)
        assert httpx.get(f"{base_url}/readyz", trust_env=False).status_code == 200
