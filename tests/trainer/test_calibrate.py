import json
import shutil

import pytest

from model import GenerationRequest, load_pipeline
from model.cache_config import load_cache_config
from model.checkpoint import verify_manifest, write_manifest
from tests.tiny_checkpoint import make_tiny_checkpoint, write_generation_config
from trainer import calibrate as module
from trainer.calibrate import _progress, num_computed, solvers_of
from trainer.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("calibrate") / "tiny")
    write_generation_config(
        folder,
        defaults={"num_inference_steps": 8, "width": 32, "height": 32},
        limits={"min_size": 16, "max_size": 64, "max_steps": 12},
    )
    return folder


def test_how_many_steps_a_speed_allows():
    assert num_computed(30, 1.5, 0.0) == 20
    assert num_computed(30, 2.0, 0.2) == 11  # (1/2 - 1/5) / (4/5) of them
    assert num_computed(30, 10.0, 0.2) == 2
    assert num_computed(1, 2.0, 0.2) == 1
    assert num_computed(30, 2.0, 1.0) == 30  # skipping gains nothing


def test_the_solvers_are_within_the_limits_and_the_default_is_first(tiny):
    solvers = solvers_of(load_pipeline(tiny))
    assert solvers[0].settings == {
        "sampler": "euler", "time_grid": "diffusers", "num_inference_steps": 8, "shift": 6.0,
    }  # fmt: skip
    assert {s.sampler for s in solvers} == {"euler", "midpoint", "dpm"}
    assert max(s.num_inference_steps for s in solvers) == 12
    assert len(set(solvers)) == len(solvers)


@pytest.mark.slow
def test_the_file_is_read_by_the_pipeline_and_the_manifest_holds(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    write_manifest(folder, {"recipe": "none"})
    assert main(["calibrate", str(folder), "--per-task", "1"]) == 0
    out = capsys.readouterr().out
    assert "balanced" in out
    assert "teacache.json" in out
    manifest = verify_manifest(folder)
    assert manifest["recipe"] == "none"
    assert "teacache.json" in manifest["files"]
    config = load_cache_config(folder)
    content = json.loads((folder / "teacache.json").read_text())
    assert list(config.coefficients) == content["coefficients"]
    for name in ("balanced", "fast"):
        measured = content["presets"][name]["measured"]
        assert measured["pictures"] == 6
        assert measured["size"] == [32, 32]
        assert measured["computed_steps"] <= measured["steps"] == 8
        assert {s.sampler for s in config.schedules[name]} == {"euler", "midpoint", "dpm"}
    state = load_pipeline(folder).prepare(GenerationRequest("a", cache="balanced"))
    assert state.warnings == []
    # A second calibration replaces the first.
    assert main(["calibrate", str(folder), "--per-task", "1"]) == 0
    assert verify_manifest(folder)["files"].keys() == manifest["files"].keys()


def test_a_folder_without_manifest_gets_none(tiny, tmp_path):
    module.write_calibration(tmp_path, {"coefficients": [0, 0, 0, 1, 0]})
    assert [path.name for path in tmp_path.iterdir()] == ["teacache.json"]


def test_what_cannot_be_calibrated_is_one_line(tmp_path, capsys):
    assert main(["calibrate", str(tmp_path / "nowhere")]) == 2
    assert "there is no such checkpoint folder" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("trainer: ")


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys):
    with _progress(2, shown=True) as done:
        done()
        done()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "calibrating: part 1 of 2",
        "calibrating: part 2 of 2",
    ]
    assert lines[-1].endswith("about 0 s to go")
    with _progress(1, shown=False) as done:
        done()
    assert capsys.readouterr().err == ""
