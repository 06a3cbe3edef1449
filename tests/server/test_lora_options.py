"""`--lora FILE[:SCALE]`."""

from pathlib import Path

import pytest
import typer

from model.request import MAX_LORA_SCALE
from server import lora_options
from server.lora_options import MergedLora, merged_lora


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ink:2.safetensors"  # a colon of its own
    path.touch()
    return path


@pytest.mark.parametrize(
    ("suffix", "scale"), [("", 1.0), (":0.5", 0.5), (":-2", -2.0), (":1e-3", 0.001), (":10", 10.0)]
)
def test_a_file_and_its_scale(file: Path, suffix: str, scale: float) -> None:
    lora = merged_lora(f"{file}{suffix}")
    assert lora == MergedLora(file, scale)
    assert merged_lora(str(lora)) == lora  # as it is handed to workers


@pytest.mark.parametrize(
    ("suffix", "words"),
    [(":x", "FILE or FILE:SCALE"), (":11", "from -10 to 10"), (":nan", "from -10 to 10"),
     (":inf", "from -10 to 10"), (".gone", "FILE or FILE:SCALE"), (".gone:1", "no such file")],
)  # fmt: skip
def test_misuse(file: Path, suffix: str, words: str) -> None:
    with pytest.raises(typer.BadParameter, match=words):
        merged_lora(f"{file}{suffix}")
    with pytest.raises(typer.BadParameter, match="no such file"):
        merged_lora("gone.safetensors")


def test_bounds_agree_with_the_model() -> None:
    assert lora_options.MAX_SCALE == MAX_LORA_SCALE
