"""A paper recipe in miniature, on parts that diffusers wrote: train, preview, export, draw."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import GenerationRequest, load_pipeline
from model.checkpoint import verify_manifest
from tests.tiny_checkpoint import make_tiny_checkpoint
from trainer import checkpoint
from trainer.cli import main
from trainer.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STAGE = "high-quality"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("flow") / "tiny")


@pytest.fixture(scope="module")
def command(tiny, tmp_path_factory):
    """Trains the smoke version; the same words go on with it."""
    folder = tmp_path_factory.mktemp("flow") / "run"
    words = ["train", "lumina2-stage3-hq", "--smoke", "--init", str(tiny), "--out", str(folder)]
    assert main(words) == 0
    return words


def test_a_stage_leaves_metrics_previews_and_a_report(command):
    stage = Path(command[-1]) / STAGE
    rows = read_metrics(stage / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        parts = row["loss_velocity"] + row["loss_auxiliary"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["lr"] == 2e-4
    picture = np.asarray(Image.open(stage / "previews" / "step-00000003.png"))
    assert picture.shape == (64, 128, 3)
    assert picture.std() > 1
    report = (stage / "report.md").read_text()
    assert "![loss](plot-loss.svg)" in report
    assert "previews/step-00000003.png" in report


def test_it_is_exported_with_the_averaged_weights_and_drawn_from(command, tiny, tmp_path):
    run, out = command[-1], tmp_path / "out"
    assert main(["export", run, "--out", str(out), "--init", str(tiny)]) == 0
    manifest = verify_manifest(out)
    assert manifest["stages"] == {STAGE: 3}
    pipeline = load_pipeline(out)
    steps, average = checkpoint.load_average(Path(run) / STAGE)
    assert steps == 3
    for name, weight in pipeline.dit.state_dict().items():
        assert torch.equal(weight, average[name].bfloat16().float()), name
    request = GenerationRequest("a red circle", seed=1, num_inference_steps=2)
    assert pipeline.generate([request])[0][0].size == (64, 64)
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["defaults"]["cfg_renorm"] == "global"


def test_a_finished_run_trains_nothing_again(command, capsys):
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"done: {command[-1]}\n")
