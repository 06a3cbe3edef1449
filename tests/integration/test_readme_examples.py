"""The examples of README, run as they stand against a service with the bundled checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

ROOT = Path(__file__).parents[2]
ADDRESS = "localhost:8000"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def examples(language):
    """The code blocks of README in a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(demo_service, tmp_path):
    """Run a program in an empty folder that sees the checkpoints; returns what it printed."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": paths}

    def run(*argv):
        here = [word.replace(ADDRESS, f"127.0.0.1:{demo_service.port}") for word in argv]
        done = subprocess.run(
            here, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def pictures(folder):
    """The sizes of all pictures that lie there, by name; every one must open."""
    sizes = {}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            sizes[path.name] = picture.size
    return sizes


def test_the_shell_examples(run, tmp_path):
    blocks = [block for block in examples("sh") if ADDRESS in block]
    assert len(blocks) == 3
    told = "".join(run("bash", "-euo", "pipefail", "-c", block) for block in blocks)
    assert set(pictures(tmp_path)) == {"a.png", "stars.png", "cross.png", "cross3.png"}
    names = re.findall(r"^event: (\w+)$", told, re.MULTILINE)
    assert [name for name in names if name != "preview"][:2] == ["queued", "started"]
    assert names[-1] == "succeeded"
    assert re.search(r"^prompt +a green cross$", told, re.MULTILINE)
    assert re.search(r"^seed +3$", told, re.MULTILINE)


def test_the_python_examples(run, tmp_path):
    blocks = examples("python")
    client, openai, library = (
        next(block for block in blocks if mark in block)
        for mark in ("server.client", "openai", "load_pipeline")
    )
    assert len(blocks) == 3
    told = run(sys.executable, "-W", "error", "-c", client).splitlines()
    assert told[0].startswith("queued ")
    assert any(line.startswith("succeeded ") for line in told)
    assert "denoise_s=" in told[-2]
    assert re.fullmatch(r"width must be .* a multiple of 16.*, got 100", told[-1])
    run(sys.executable, "-W", "error", "-c", openai)
    run(sys.executable, "-c", library)
    assert set(pictures(tmp_path)) == {
        "circle0.png", "circle1.png", "openai.png", "star-partial0.png", "star-partial1.png",
        "star.png", "a.png",
    }  # fmt: skip
    assert pictures(tmp_path)["openai.png"] == (128, 128)
    drawn = {name: Image.open(tmp_path / name).convert("RGB") for name in pictures(tmp_path)}
    # Two examples ask for the same picture: of a service, and of the library in this process.
    apart = ImageChops.difference(drawn["circle0.png"], drawn.pop("a.png"))
    assert max(high for _, high in apart.getextrema()) <= 1
    assert len({image.tobytes() for image in drawn.values()}) == len(drawn)
