"""The bundled checkpoint: whole, small, understood by diffusers, batch-invariant, and any good."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from model import GenerationRequest, load_pipeline
from model.checkpoint import verify_manifest
from tests.model.conftest import max_difference, psnr
from trainer.evaluate.demo import evaluate_demo

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
MAX_BYTES = 40 * 10**6

# Different sizes, step counts, guidance, truncation and image counts in one crowd.
CROWD = (
    GenerationRequest("a red circle above a blue square", seed=1),
    GenerationRequest("three yellow stars", seed=2, width=128, height=64, num_inference_steps=7),
    GenerationRequest("a green cross", seed=3, width=96, height=96, guidance_scale=1.0),
    GenerationRequest("two cyan squares", seed=4, width=64, height=112, cfg_trunc_ratio=0.4),
    GenerationRequest("a pink star", seed=5, width=128, height=128, num_images=2),
    GenerationRequest("a circle", seed=6, width=80, height=64, cfg_trunc_t=0.3, shift=6.0),
)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(DEMO)


def test_it_is_small_and_its_manifest_holds():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    manifest = verify_manifest(DEMO)
    assert manifest is not None
    listed = {*manifest["files"], "manifest.json"}
    assert {path.relative_to(DEMO).as_posix() for path in files} == listed


def test_the_model_card_quotes_the_scores_of_the_manifest():
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    scores = (verify_manifest(DEMO) or {})["scores"]
    assert scores
    for size, by_task in scores.items():
        assert f"| {size} |" in card
        assert f"**{by_task['overall']:.3f}**" in card


def test_its_cache_presets_were_measured_and_are_good_enough():
    """`trainer calibrate` again after every change of the weights."""
    presets = json.loads((DEMO / "teacache.json").read_text(encoding="utf-8"))["presets"]
    assert set(presets) == {"balanced", "fast"}
    for preset in presets.values():
        measured = preset["measured"]
        assert measured["psnr_db"] >= 28.0
        assert measured["computed_steps"] < measured["steps"]
    balanced = presets["balanced"]["measured"]
    # Two points, and the one picture by which a small sample can miss them.
    allowed = 0.02 + 1 / balanced["pictures"]
    assert balanced["judged_right"] >= balanced["judged_right_uncached"] - allowed


@pytest.mark.slow
def test_a_few_held_out_prompts_are_drawn_right(pipeline):
    settings = pipeline.generation_config.defaults
    report = evaluate_demo(pipeline, settings["width"], limit=60, seed=100, progress=False)
    # 60 pictures have a standard error of 0.06: the floor sits well below the card's score.
    score = (verify_manifest(DEMO) or {})["scores"]["64x64"]["overall"]
    assert report.overall() >= score - 0.15, report.to_json()["tasks"]
    assert report.score("colors") >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg_trunc_ratio": 0.5}, {"guidance_scale": 1.0}],
    ids=["full CFG", "truncated", "no CFG"],
)
def test_diffusers_draws_the_same_picture(pipeline, settings):
    import torch
    from diffusers import Lumina2Pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = Lumina2Pipeline.from_pretrained(DEMO)
    reference.set_progress_bar_config(disable=True)
    defaults = pipeline.generation_config.defaults
    prompt = "a green triangle to the left of a purple cross"
    ours = pipeline.generate([GenerationRequest(prompt, seed=11, **settings)])[0][0]
    theirs = reference(
        prompt,
        width=defaults["width"],
        height=defaults["height"],
        num_inference_steps=defaults["num_inference_steps"],
        guidance_scale=settings.get("guidance_scale", defaults["guidance_scale"]),
        cfg_trunc_ratio=settings.get("cfg_trunc_ratio", 1.0),
        cfg_normalization=defaults["cfg_renorm"] == "row",
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    assert psnr(ours, theirs) >= 40.0


@pytest.mark.slow
def test_a_crowd_changes_no_picture_by_more_than_one_level(pipeline):
    together = pipeline.generate(CROWD)
    for request, images in zip(CROWD, together, strict=True):
        alone = pipeline.generate([request])[0]
        for image, solo in zip(images, alone, strict=True):
            assert max_difference(image, solo) <= 1, request


@pytest.mark.slow
def test_the_same_request_twice_gives_identical_bytes(pipeline):
    first = pipeline.generate(CROWD[:1])[0][0]
    second = pipeline.generate(CROWD[:1])[0][0]
    assert first.tobytes() == second.tobytes()
