import json

import numpy as np
import pytest
from PIL import Image

from trainer.demo.dataset import build, make_arrays, scene_at
from trainer.demo.grammar import LANGUAGES, LEVELS
from trainer.demo.render import render


def test_arrays_do_not_depend_on_how_they_are_sliced():
    images, scenes = make_arrays(8, 5, 64, 64)
    tail, tail_scenes = make_arrays(3, 5, 64, 64, first=5)
    np.testing.assert_array_equal(images[5:], tail)
    assert scenes[5:] == tail_scenes
    assert images.shape == (8, 64, 64, 3)
    assert images.dtype == np.uint8


def test_one_scene_at_every_size():
    assert make_arrays(4, 1, 64, 64)[1] == make_arrays(4, 1, 128, 96)[1]


def test_seeds_and_dense_share_change_the_scenes():
    assert scene_at(0, 0) != scene_at(1, 0)
    kinds = [scene_at(0, i, dense_share=0.5).kind for i in range(60)]
    assert 15 < kinds.count("dense") < 45


def test_built_folder_holds_whole_records(tmp_path):
    folder = build(tmp_path / "data", 10, seed=3, sizes=((64, 64), (96, 64)))
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 10
    for index, record in enumerate(records):
        image = np.asarray(Image.open(folder / record["image"]))
        assert image.shape == (record["height"], record["width"], 3)
        np.testing.assert_array_equal(
            image, render(scene_at(3, index), record["width"], record["height"])
        )
        ways = [(text["language"], text["level"]) for text in record["captions"]]
        assert ways == [(language, level) for language in LANGUAGES for level in LEVELS]
        assert all(text["text"] for text in record["captions"])
    info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert (info["num"], info["seed"]) == (10, 3)


def test_same_seed_builds_identical_records(tmp_path):
    first = build(tmp_path / "a", 5, seed=9) / "records.jsonl"
    second = build(tmp_path / "b", 5, seed=9) / "records.jsonl"
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_worker_processes_build_the_same_dataset(tmp_path):
    serial = build(tmp_path / "a", 2100, processes=1) / "records.jsonl"
    pooled = build(tmp_path / "b", 2100, processes=2) / "records.jsonl"
    assert serial.read_bytes() == pooled.read_bytes()


@pytest.mark.parametrize(
    ("num", "sizes", "message"),
    [
        (0, ((64, 64),), "num is 0"),
        (1, (), "sizes is empty"),
        (1, ((65, 64),), "size is 65x64"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, num, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data", num, sizes=sizes)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        build(tmp_path, 1)
