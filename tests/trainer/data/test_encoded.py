"""A folder of pictures, encoded once: what is read back, what is left out, what a kill leaves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from model.templates import compose_prompt
from model.vae import VAE
from tests.tiny_checkpoint import make_tiny_checkpoint
from tests.trainer.flow_world import stage_config
from trainer.config import DatasetConfig, load_recipe
from trainer.data.captions import CaptionEncoder
from trainer.data.records import Caption, CaptionChoice, Record, read_records
from trainer.distributed import World
from trainer.stages.parts import FrozenParts, encoded_data

PICTURES = {"wide.png": (200, 80), "square.png": (128, 128), "tall.png": (70, 140)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("encoded") / "tiny")


@pytest.fixture
def folder(tmp_path):
    """Three good records, and one of every fault."""
    root = tmp_path / "set"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in PICTURES.items():
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    (root / "broken.png").write_bytes((root / "square.png").read_bytes()[:90])
    good = [
        {
            "image": "wide.png",
            "captions": [
                {"text": "a", "level": "short", "language": "en"},
                {"text": "one two", "level": "detailed", "language": "en"},
            ],
        },
        {"image": "square.png", "prompt": "b", "domain": "photo"},
        {"image": "tall.png", "captions": ["c", "dd"]},
    ]
    bad = [
        {"image": "broken.png", "prompt": "x"},
        {"image": "missing.png", "prompt": "x"},
        {"image": "square.png", "prompt": "  "},
        {"image": "square.png", "captions": [{"text": "x", "level": "tags", "language": "en"}]},
        {"prompt": "x"},
        {"image": "square.png", "captions": 3},
    ]
    lines = [json.dumps(record) for record in good + bad]
    (root / "records.jsonl").write_text("\n".join([*lines, "{half", ""]))
    return root


def recipe_on(folder, **data):
    return load_recipe("lumina2-stage1-256").model_copy(
        update={"data": DatasetConfig(path=str(folder), **data)}
    )


CONFIG = stage_config(domains={"default": "base", "photo": "real"})


def encode(folder, out, tiny, **data):
    frozen = FrozenParts(tiny / "vae", tiny, World())
    return encoded_data(recipe_on(folder, **data), CONFIG, out, frozen, World())


def test_what_is_read_back_is_what_the_frozen_parts_make(folder, tiny, tmp_path, capsys):
    data = encode(folder, tmp_path, tiny)
    assert [data.record(i).name for i in range(len(data))] == list(PICTURES)
    shapes = [tuple(data.latents(i).shape) for i in range(3)]
    assert shapes == [(16, 10, 24), (16, 16, 16), (16, 24, 10)]
    texts = ["", compose_prompt("one two", "base"), compose_prompt("b", "real")]
    expected = CaptionEncoder(tiny).encode(texts)
    found = [data.features(0, None), data.features(0, 1), data.features(1, 0)]
    for features, other in zip(found, expected, strict=True):
        torch.testing.assert_close(features, other.bfloat16().float(), rtol=0.05, atol=0.05)
    assert data.tokens(0, 1) == 5 * 12 + len(found[1])
    assert (data.tokens(0, None), data.image_tokens(0)) == (60 + len(found[0]), 60)
    pixels = torch.from_numpy(np.array(Image.open(folder / "square.png"))).permute(2, 0, 1)
    latents = VAE.from_pretrained(tiny / "vae").encode(pixels[None] / 127.5 - 1.0)[0]
    torch.testing.assert_close(data.latents(1), latents, rtol=1e-2, atol=1e-2)

    (listed,) = (tmp_path / "cache").glob("*/skipped.jsonl")
    faults = {line["reason"] for line in map(json.loads, listed.read_text().splitlines())}
    for reason in (
        "missing.png: there is no such file",
        "square.png: there is no caption with text",
        "'image' must name a file",
        "'captions' must be a list",
        "no caption has a level and language that the stage draws",
    ):
        assert reason in faults
    assert any("the picture cannot be read" in reason for reason in faults)
    assert any("not valid JSON" in reason for reason in faults)
    assert "7 records left out" in capsys.readouterr().err


def test_encoded_once_and_again_for_other_parts(folder, tiny, tmp_path):
    encode(folder, tmp_path, tiny)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    (index,) = (tmp_path / "cache").rglob("index-*.json")
    assert len(files) == 2
    encode(folder, tmp_path, tiny)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    index.unlink()  # as if killed before the end
    encode(folder, tmp_path, tiny)
    assert index.is_file()
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"image": "wide.png", "prompt": "new"}\n')
    assert len(encode(folder, tmp_path, tiny)) == 4


def test_bad_data_stops_where_the_recipe_says_so(folder, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"data: 5 bad records, the first is records\.jsonl:5"):
        encode(folder, tmp_path, tiny, on_bad="stop")


def test_a_folder_without_anything_usable_is_named(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"holds no records\.jsonl"):
        read_records(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"image": "x.png", "prompt": "x"}\n')
    with pytest.raises(ValueError, match="none of 0 records can be used"):
        encode(tmp_path, tmp_path, tiny)


def test_captions_are_drawn_by_level_and_language():
    choice = CaptionChoice(
        stage_config(levels={"short": 1.0, "detailed": 3.0}, languages={"en": 1.0, "zh": 0.5})
    )
    captions = (
        Caption("a", "short", "en"),
        Caption("b", "detailed", "zh"),
        Caption("c", "tags", "en"),
        Caption("d", "short", "fr"),
        Caption("e"),
    )
    assert choice.weights(captions) == [1.0, 1.5, 0.0, 0.0, 1.0]
    record, rng = Record("x", None, captions), np.random.default_rng(0)
    drawn = [choice.draw(record, rng) for _ in range(20_000)]
    assert drawn.count(None) / len(drawn) == pytest.approx(0.1, abs=0.01)
    shares = [drawn.count(place) / (len(drawn) - drawn.count(None)) for place in range(5)]
    assert shares == pytest.approx([2 / 7, 3 / 7, 0, 0, 2 / 7], abs=0.02)
    assert choice.prompt(record, None) == ""
    assert choice.prompt(record, 0) == compose_prompt("a", "base")
