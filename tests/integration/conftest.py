"""One `lumina serve` with the bundled checkpoint for all tests here that only ask it to draw."""

from pathlib import Path

import pytest

from tests.server.embedded.test_service import Service

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


@pytest.fixture(scope="package")
def demo_service(tmp_path_factory):
    """A running service; starting one takes seconds."""
    running = Service(DEMO, tmp_path_factory.mktemp("serve") / "data")
    running.wait_ready()
    yield running
    running.process.terminate()
    running.process.wait(40)
    running.end()
