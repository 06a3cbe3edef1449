"""The built-in presets: what each draws, compared with the code it is named after."""

from itertools import pairwise

import pytest
import torch

from model import GenerationRequest
from model.templates import TEMPLATES
from tests.model.conftest import psnr

PROMPT, NEGATIVE, SEED = "a red circle above a blue square", "grey", 4


def ours(pipeline, **settings):
    request = GenerationRequest(PROMPT, seed=SEED, negative_prompt=NEGATIVE, **settings)
    return pipeline.generate([request])[0][0]


def embed(reference, text):
    """diffusers' own text features of a complete text, with their mask."""
    return reference._get_gemma_prompt_embeds(text)


@torch.no_grad()
def official_sampling(reference, *, points=18, shift=6.0, w=4.0, alpha=0.25):
    """The official script written out on diffusers' modules: midpoint, renormalised, truncated."""
    system = TEMPLATES["real"] + " <Prompt Start> "
    cond, uncond = embed(reference, system + PROMPT), embed(reference, system + NEGATIVE)

    def velocity(x, t):
        def branch(features):
            times = torch.tensor([t], dtype=torch.float32)
            return reference.transformer(x, times, *features, return_dict=False)[0]

        v_cond = branch(cond)
        if t >= alpha:
            return v_cond
        v_uncond = branch(uncond)
        guided = v_uncond + w * (v_cond - v_uncond)
        return guided * min(1.0, float(v_cond.norm() / guided.norm()))

    x = torch.randn(1, 16, 8, 8, generator=torch.Generator("cpu").manual_seed(SEED))
    uniform = [i / (points - 1) for i in range(points)]
    times = [t / (t + shift - shift * t) for t in uniform]
    for left, right in pairwise(times):
        half = x + 0.5 * (right - left) * velocity(x, left)
        x = x + (right - left) * velocity(half, 0.5 * (left + right))
    pixels = reference.vae.decode(x / 0.3611 + 0.1159, return_dict=False)[0]
    return reference.image_processor.postprocess(pixels)[0]


@pytest.mark.slow
def test_preset_official_draws_what_the_official_script_draws(pipeline, reference):
    expected = official_sampling(reference)
    matched = psnr(ours(pipeline, preset="official"), expected)
    assert matched >= 45
    for change in ({"sampler": "euler"}, {"negative_template": False}, {"cfg_renorm": "row"}):
        assert psnr(ours(pipeline, preset="official", **change), expected) < matched - 5, change


@pytest.mark.slow
def test_preset_diffusers_draws_what_diffusers_draws(pipeline, reference):
    expected = reference(
        PROMPT,
        width=64,
        height=64,
        negative_prompt=NEGATIVE,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).images[0]
    assert psnr(ours(pipeline, preset="diffusers"), expected) >= 45
    assert psnr(ours(pipeline, preset="official"), expected) < 40


@pytest.mark.slow
def test_a_preset_is_its_settings_and_nothing_else(pipeline):
    for name in ("official", "diffusers"):
        settings = pipeline.generation_config.presets[name]
        named, spelt = ours(pipeline, preset=name), ours(pipeline, **settings)
        assert named.tobytes() == spelt.tobytes()
