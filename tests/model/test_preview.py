"""Predicted clean latents of every sampler, and the linear preview against the VAE itself."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from model import GenerationRequest, load_pipeline
from model.preview import LatentPainter, LatentPreview
from model.samplers import make_sampler
from model.vae import to_pil
from tests.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("name", ["euler", "midpoint", "dpm"])
def test_a_straight_way_is_foreseen_from_every_step(name):
    torch.manual_seed(0)
    noise, data = torch.randn(4, 6, 6), torch.randn(4, 6, 6)
    sampler = make_sampler(
        name, time_grid="diffusers", num_inference_steps=7, shift=3.0, sigmas=None
    )
    first = sampler.sigma_at(0)  # DPM's grid begins just below pure noise
    state = sampler.start(first * noise + (1 - first) * data)
    for _ in range(sampler.num_evaluations):
        after = sampler.step(state, data - noise)
        torch.testing.assert_close(sampler.predicted(state, after), data, atol=1e-4, rtol=1e-4)
        state = after


def test_a_request_foresees_its_end_at_its_last_step(pipeline):
    state = pipeline.prepare(GenerationRequest("a cat", seed=1, num_inference_steps=4))
    torch.testing.assert_close(state.predicted, state.latents)  # nothing foreseen yet
    seen = []
    while not state.finished:
        pipeline.denoise_step([state])
        seen.append(state.predicted[0])
    torch.testing.assert_close(seen[-1], state.latents[0], atol=1e-5, rtol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(seen))


def test_the_linear_map_finds_an_autoencoder_that_is_linear():
    """An autoencoder whose latents are mean colours, turned by a known matrix."""
    matrix = torch.tensor([[2.0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 3.0]])

    class Linear:
        downscale = 8

        def encode(self, pixels):
            colours = torch.nn.functional.avg_pool2d(pixels, 8)
            return torch.einsum("nchw,cd->ndhw", colours, matrix) + 0.5

    colours = torch.rand(3, 5, 7) * 2 - 1
    latents = torch.einsum("chw,cd->dhw", colours, matrix) + 0.5
    drawn = np.asarray(LatentPreview.fit(Linear()).draw(latents), dtype=float)
    assert np.abs(drawn - np.asarray(to_pil(colours), dtype=float)).max() <= 4
    assert drawn.shape == (5, 7, 3)


def test_the_demo_autoencoder_is_near_enough_to_linear():
    vae = load_pipeline("checkpoints/demo").vae
    torch.manual_seed(1)
    picture = torch.nn.functional.interpolate(
        torch.rand(1, 3, 3, 3) * 2 - 1, size=(64, 64), mode="bilinear"
    )
    latents = vae.encode(picture)[0]
    drawn = torch.from_numpy(np.array(LatentPainter(vae).rough(latents))).movedim(-1, 0) / 127.5 - 1
    true = torch.nn.functional.avg_pool2d(picture[0], 8)
    psnr = -10 * torch.log10(((drawn - true) ** 2).mean() / 4)
    assert psnr > 20


def test_the_painter_decodes_as_the_pipeline_does(pipeline):
    state = pipeline.prepare(GenerationRequest("a cat", seed=1, num_inference_steps=2))
    pipeline.denoise_step([state])
    full = LatentPainter(pipeline.vae).full(state.latents[0])
    ((expected,),) = pipeline.decode([state])
    assert full.tobytes() == expected.tobytes()
