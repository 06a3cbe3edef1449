import json

import pytest
import torch

from model import GenerationRequest, load_pipeline
from model.pipeline import Pipeline
from model.templates import TEMPLATES
from tests.model.conftest import max_difference, psnr

PROMPT = "a red circle above a blue square"
STEPS = 8


def ours(pipeline: Pipeline, **settings):
    settings = {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 1} | settings
    return pipeline.generate([GenerationRequest(**settings)])[0]


def theirs(reference, seed: int = 1, **settings):
    settings = {
        "prompt": PROMPT,
        "num_inference_steps": STEPS,
        "width": 64,
        "height": 64,
    } | settings
    generator = torch.Generator("cpu").manual_seed(seed)
    return reference(generator=generator, **settings).images[0]


@pytest.mark.parametrize(
    ("our_settings", "their_settings"),
    [
        ({}, {}),
        ({"cfg_trunc_ratio": 0.5}, {"cfg_trunc_ratio": 0.5}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"cfg_renorm": "none"}, {"cfg_normalization": False}),
        ({"width": 96, "height": 48}, {"width": 96, "height": 48}),
        ({"negative_prompt": "grey"}, {"negative_prompt": "grey"}),
        ({"system_prompt": "Paint."}, {"system_prompt": "Paint."}),
        ({"system_prompt": "base"}, {"system_prompt": TEMPLATES["base"]}),
        ({"prompt": "a red dot " * 60}, {"prompt": "a red dot " * 60}),
        ({"num_inference_steps": 1}, {"num_inference_steps": 1}),
    ],
    ids=lambda settings: "-".join(f"{k}={str(v)[:12]}" for k, v in settings.items()) or "full",
)
def test_same_picture_as_diffusers(pipeline, reference, our_settings, their_settings):
    (image,) = ours(pipeline, **our_settings)
    expected = theirs(reference, **their_settings)
    assert image.size == expected.size
    assert psnr(image, expected) >= 45


def test_the_comparison_can_fail(pipeline, reference):
    """Prompt, guidance, truncation and renormalisation move the picture below the bound."""
    expected = theirs(reference)
    for settings in (
        {"prompt": "a blue square above a red circle"},
        {"guidance_scale": 1.0},
        {"cfg_trunc_ratio": 0.5},
        {"cfg_renorm": "none"},
        {"cfg_renorm": "global"},
        {"seed": 2},
    ):
        assert psnr(ours(pipeline, **settings)[0], expected) < 40, settings


def test_official_dialect_equals_an_equivalent_diffusers_setting(pipeline, reference):
    settings = {"time_grid": "official", "num_inference_steps": STEPS + 1, "cfg_trunc_t": 0.25}
    (image,) = ours(pipeline, **settings)
    guided = sum(i / (6 * STEPS - 5 * i) < 0.25 for i in range(STEPS))
    assert psnr(image, theirs(reference, cfg_trunc_ratio=guided / STEPS)) >= 45


def test_image_k_uses_seed_plus_k(pipeline, reference):
    images = ours(pipeline, num_images=3)
    for k, image in enumerate(images):
        assert psnr(image, theirs(reference, seed=1 + k)) >= 45


CROWD = [
    {"prompt": "a red circle", "width": 64, "height": 64},
    {"prompt": "x", "width": 96, "height": 48, "num_inference_steps": 3, "num_images": 2},
    {"prompt": "two green stars", "guidance_scale": 1.0, "num_inference_steps": 11},
    {"prompt": "a cat", "cfg_trunc_ratio": 0.4, "width": 16, "height": 128},
    {"prompt": "a dog", "cfg_trunc_t": 0.2, "time_grid": "official", "cfg_renorm": "global"},
    {"prompt": "a red circle", "negative_prompt": "blue", "shift": 3.0, "system_prompt": "empty"},
    {"prompt": "a red circle", "sampler": "midpoint", "time_grid": "official", "cfg_trunc_t": 0.25},
    {"prompt": "a blue dot", "sampler": "dpm", "negative_prompt": "red", "num_images": 2},
    {"prompt": "a tree", "sigmas": [1.0, 0.9, 0.5], "sampler": "midpoint", "width": 32},
    {"prompt": "a bird", "preset": "official", "num_inference_steps": 5, "panel": {}},
]


def crowd_requests() -> list[GenerationRequest]:
    base = {"num_inference_steps": STEPS}
    settings = [s if "sigmas" in s else base | s for s in CROWD]
    return [GenerationRequest(seed=10 + i, **s) for i, s in enumerate(settings)]


def test_alone_or_in_a_crowd(pipeline):
    requests = crowd_requests()
    together = pipeline.generate(requests)
    for request, images in zip(requests, together, strict=True):
        (alone,) = pipeline.generate([request])
        assert len(images) == request.num_images
        for image, other in zip(images, alone, strict=True):
            assert max_difference(image, other) <= 1


def test_joining_late_changes_nothing(pipeline):
    first, second, *_ = crowd_requests()
    (alone,) = pipeline.generate([second])
    states = [pipeline.prepare(first)]
    pipeline.denoise_step(states)
    states.append(pipeline.prepare(second))
    while running := [state for state in states if not state.finished]:
        pipeline.denoise_step(running)
    for image, other in zip(pipeline.decode(states)[1], alone, strict=True):
        assert max_difference(image, other) <= 1


def test_same_request_twice_gives_the_same_bytes(pipeline):
    first, second = (ours(pipeline, num_images=2) for _ in range(2))
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_state_counts_steps_and_tokens(pipeline):
    request = GenerationRequest(
        "abc", system_prompt="empty", num_inference_steps=4, cfg_trunc_ratio=0.5, num_images=2
    )
    state = pipeline.prepare(request)
    cond, uncond, image = 4, 1, 16
    seen = []
    while not state.finished:
        seen.append((state.step_index, state.guided, state.num_tokens))
        pipeline.denoise_step([state])
    both, single = 2 * (cond + uncond + 2 * image), 2 * (cond + image)
    assert seen == [(0, True, both), (1, True, both), (2, False, single), (3, False, single)]
    assert (state.steps_computed, state.steps_cfg, state.nfe, state.num_tokens) == (4, 2, 6, 0)
    assert state.prompt_tokens == cond
    assert all(latents.dtype == torch.float32 for latents in state.latents)


@pytest.mark.parametrize("settings", [{"guidance_scale": 1.0}, {"cfg_trunc_ratio": 0.2}])
def test_uncond_is_not_encoded_when_no_step_is_guided(pipeline, settings):
    state = pipeline.prepare(GenerationRequest("a", num_inference_steps=4, **settings))
    assert state.uncond is None


def test_warnings_name_what_was_dropped_or_ignored(pipeline):
    long = "x" * 297 + "END"
    lost = f"the last 45 were dropped, that is {'x' * 42 + 'END'!r}"
    request = GenerationRequest(
        long, negative_prompt=long, system_prompt="empty", cfg_renorm_scale=2.0
    )
    assert pipeline.prepare(request).warnings == [
        f"prompt is longer than 256 tokens (template included): {lost}",
        f"negative_prompt is longer than 256 tokens (template included): {lost}",
        "cfg_renorm_scale 2 has no effect with cfg_renorm 'row'",
    ]
    assert pipeline.prepare(GenerationRequest("a red circle")).warnings == []


def test_a_misspelt_template_is_free_text_with_a_warning(pipeline):
    def warned(system_prompt):
        return pipeline.prepare(GenerationRequest("a", system_prompt=system_prompt)).warnings

    taken = "is taken as free text (did you mean"
    assert warned("basee") == [f"system_prompt 'basee' {taken} 'base'?)"]
    assert warned("Real") == [f"system_prompt 'Real' {taken} 'real'?)"]
    for meant in ("base", "", "Draw in the style of a real master."):
        assert warned(meant) == []


def test_progress_is_reported_after_every_forward(pipeline):
    seen = []
    requests = [GenerationRequest("a", num_inference_steps=n, seed=1) for n in (2, 3)]
    pipeline.generate(requests, lambda states: seen.append([s.step_index for s in states]))
    assert seen == [[1, 1], [2, 2], [2, 3]]


def test_failed_forward_leaves_states_untouched(pipeline):
    state = pipeline.prepare(GenerationRequest("a", num_inference_steps=2, seed=1))
    other = pipeline.prepare(GenerationRequest("b", num_inference_steps=2, seed=1))
    other.cond = other.cond[:, :3]  # does not fit the network
    before = state.latents[0].clone()
    with pytest.raises((RuntimeError, ValueError)):
        pipeline.denoise_step([state, other])
    assert (state.step_index, state.steps_computed) == (0, 0)
    assert torch.equal(state.latents[0], before)


def test_nothing_to_do(pipeline):
    assert pipeline.generate([]) == []


def test_unknown_preset(pipeline):
    with pytest.raises(ValueError, match="preset 'nope'"):
        pipeline.generate([GenerationRequest("a", preset="nope")])


@pytest.mark.parametrize(
    ("options", "weights", "precision"),
    [
        ({}, torch.float32, "fp32"),
        ({"dtype": torch.bfloat16}, torch.bfloat16, "bf16"),
        ({"precision": "bf16"}, torch.bfloat16, "bf16"),
        ({"precision": "mixed"}, torch.bfloat16, "mixed"),
        ({"precision": "fp32", "dtype": torch.bfloat16}, torch.float32, "fp32"),
    ],
    ids=str,
)
def test_every_precision_gives_about_the_same_picture(
    tiny_folder, pipeline, options, weights, precision
):
    other = load_pipeline(tiny_folder, **options)
    assert (other.dit.precision, other.dtype, other.vae.dtype) == (precision, weights, weights)
    assert other.text_encoder.encode(["x"])[0].dtype == weights
    state = other.prepare(GenerationRequest("a red circle", num_inference_steps=3, seed=1))
    assert state.latents[0].dtype == torch.float32
    other.denoise_step([state])
    assert state.latents[0].dtype == torch.float32
    assert psnr(ours(other, guidance_scale=1.0)[0], ours(pipeline, guidance_scale=1.0)[0]) > 15


def test_an_unknown_precision_is_refused(tiny_folder):
    with pytest.raises(ValueError, match="precision 'fp8' is not allowed: give fp32 or bf16 or"):
        load_pipeline(tiny_folder, precision="fp8")


def test_a_forced_backend_is_refused_at_load(tiny_folder, monkeypatch):
    monkeypatch.setenv("LUMINA_ATTENTION", "fast")
    with pytest.raises(ValueError, match="LUMINA_ATTENTION 'fast' is not allowed here: give"):
        load_pipeline(tiny_folder)


def test_size_beyond_the_position_tables(folder_copy):
    path = folder_copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"axes_lens": [300, 8, 4]}))
    small = load_pipeline(folder_copy)
    small.generate([GenerationRequest("a", width=64, height=128, num_inference_steps=1)])
    with pytest.raises(ValueError, match="width 80 is not allowed: give a multiple of 16 up to 64"):
        small.prepare(GenerationRequest("a", width=80, height=64))
