"""The whole path of the trainer in miniature: train, export, load, draw."""

import json
import warnings

import numpy as np
import pytest
import torch
import yaml

from model import GenerationRequest, load_pipeline
from model.checkpoint import verify_manifest
from tests.model.conftest import psnr
from trainer import checkpoint
from trainer.cli import main
from trainer.config import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    assert main(["train", "demo", "--smoke", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run):
    folder = run.parent / "exported"
    assert main(["export", str(run), "--out", str(folder)]) == 0
    return folder


def test_every_stage_leaves_its_traces(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    stages = ["vae", "compact", "text", *(stage["name"] for stage in recipe["diffusion"])]
    for stage in stages:
        assert (run / stage / "final").is_dir()
        row = json.loads((run / stage / "metrics.jsonl").read_text().splitlines()[-1])
        assert np.isfinite(row["loss"])
        assert row["step"] == 3
    assert not list(run.rglob("*tmp*"))


def test_a_finished_run_says_done_and_trains_nothing(run, capsys):
    states = {path: path.stat().st_mtime_ns for path in run.rglob("*.distcp")}
    assert states
    capsys.readouterr()
    assert main(["train", "demo", "--smoke", "--out", str(run)]) == 0
    assert capsys.readouterr().out == f"done: {run}\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.distcp")} == states


def test_other_settings_are_refused_in_the_same_folder(run, capsys):
    assert main(["train", "demo", "--smoke", "--set", "seed=1", "--out", str(run)]) == 1
    assert "holds a run of another recipe or other settings" in capsys.readouterr().err


def test_a_stage_killed_while_it_published_is_finished(run, tmp_path, capsys):
    """Without `final` the stage is not done, whatever a killed process left beside it."""
    stage = run / load_recipe("demo").diffusion[-1].name
    weights = "diffusion_pytorch_model.safetensors"
    before = (stage / "final" / weights).read_bytes()
    (stage / "final").rename(stage / "final.tmp")
    (stage / "final.tmp" / weights).write_bytes(b"half")
    assert main(["train", "demo", "--smoke", "--out", str(run)]) == 0
    assert (stage / "final" / weights).read_bytes() == before
    assert not (stage / "final.tmp").exists()


def test_export_tells_where_it_came_from(run, exported):
    manifest = verify_manifest(exported)
    recipe = load_recipe("demo")
    assert manifest["recipe"] == "demo"
    assert manifest["stages"] == {stage.name: 3 for stage in recipe.diffusion}
    assert manifest["weights"] == "exponential moving average"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == recipe.generation
    assert {"transformer/config.json", "vae/config.json", "model_index.json"} <= {
        *manifest["files"]
    }


def test_export_holds_the_averaged_weights(run, exported):
    pipeline = load_pipeline(exported)
    stage = run / load_recipe("demo").diffusion[-1].name
    _, average = checkpoint.load_average(stage)
    for name, weight in pipeline.dit.state_dict().items():
        assert torch.equal(weight, average[name].bfloat16().float()), name


def test_ours_and_diffusers_draw_the_same_picture(exported):
    from diffusers import Lumina2Pipeline

    request = GenerationRequest(PROMPT, seed=3, width=64, height=64, num_inference_steps=4)
    ((image,),) = load_pipeline(exported).generate([request])
    assert image.size == (64, 64)
    settings = json.loads((exported / "generation_config.json").read_text())["defaults"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loading, not of drawing
        reference = Lumina2Pipeline.from_pretrained(exported, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    picture = reference(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=settings["guidance_scale"],
        cfg_normalization=settings["cfg_renorm"] != "none",
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert np.asarray(picture).std() > 1
    assert psnr(image, picture) >= 40


def test_a_new_run_starts_from_an_export(run, exported, tmp_path):
    """`--init` takes autoencoder and text encoder as they are, and goes on with the transformer."""
    folder, out = tmp_path / "second", tmp_path / "out"
    command = ["train", "demo", "--smoke", "--out", str(folder), "--init", str(exported)]
    assert main(command) == 0
    assert not (folder / "vae").exists()
    assert not (folder / "text").exists()
    assert main(["export", str(folder), "--out", str(out), "--init", str(exported)]) == 0
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / part).read_bytes() == (exported / part).read_bytes()
    verify_manifest(out)
    load_pipeline(out)
