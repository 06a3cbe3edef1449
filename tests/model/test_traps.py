"""One test per trap of the Lumina-Image 2.0 family that the table in docs/model.md decides."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lumina2_lora_to_diffusers,
)
from safetensors.torch import save_file

from model import GenerationRequest, load_pipeline
from model.checkpoint import CheckpointError
from model.config import NextDiTConfig
from model.guidance import Guidance
from model.layers import QK_NORM_EPS, Attention
from model.lora import open_lora
from model.samplers import make_sampler, make_sigmas
from model.templates import TEMPLATES, compose_negative, compose_prompt
from tests.model.conftest import max_difference


def draw(pipeline, prompt="a red circle", **settings):
    settings = {"num_inference_steps": 3, "seed": 1} | settings
    return pipeline.generate([GenerationRequest(prompt, **settings)])[0]


def test_seed_zero_is_a_seed(pipeline):
    (first,), (again,), (other,) = (draw(pipeline, seed=seed) for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_pictures_that_are_not_square_are_not_transposed(pipeline):
    (image,) = draw(pipeline, width=96, height=32)
    assert image.size == (96, 32)
    state = pipeline.prepare(GenerationRequest("a", width=96, height=32, seed=5))
    drawn = torch.randn(1, 16, 4, 12, generator=torch.Generator("cpu").manual_seed(5))[0]
    assert torch.equal(state.latents[0], drawn)


@pytest.mark.parametrize("cfg_renorm", ["global", "row"])
def test_renorm_takes_every_picture_of_a_batch_by_itself(pipeline, cfg_renorm):
    """The official comparison of norms has no answer for a batch; ours is made per picture."""
    images = draw(pipeline, num_images=3, cfg_renorm=cfg_renorm, guidance_scale=6.0)
    for k, image in enumerate(images):
        (alone,) = draw(pipeline, seed=1 + k, cfg_renorm=cfg_renorm, guidance_scale=6.0)
        assert max_difference(image, alone) <= 1


def test_several_pictures_of_several_prompts_keep_their_own_prompt(pipeline):
    """diffusers repeats embeddings and masks in different orders there: some pictures then read
    a neighbour's padding as text."""
    prompts = ("x", "three small green stars above a long red line")
    requests = [
        GenerationRequest(p, seed=1, num_inference_steps=3, num_images=2, negative_prompt=p[::-1])
        for p in prompts
    ]
    for request, images in zip(requests, pipeline.generate(requests), strict=True):
        (alone,) = pipeline.generate([request])
        for image, expected in zip(images, alone, strict=True):
            assert max_difference(image, expected) <= 1
    lengths = {p: len(pipeline.prepare(r).cond) for p, r in zip(prompts, requests, strict=True)}
    assert len(set(lengths.values())) == 2


def test_the_grid_is_shifted_once():
    """diffusers' scheduler, asked for a number of steps alone, shifts what is shifted already."""
    twice = FlowMatchEulerDiscreteScheduler(shift=6.0)
    twice.set_timesteps(10)
    once = FlowMatchEulerDiscreteScheduler(shift=6.0)
    once.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    ours = make_sigmas("diffusers", 10, 6.0)
    np.testing.assert_allclose(ours, once.sigmas, atol=1e-6)
    assert np.abs(np.array(ours) - twice.sigmas.numpy()).max() > 0.05


def test_the_schedule_knows_no_sequence_length(pipeline, folder_copy):
    """Both codebases hand the channel count to a shift by length. We have no such shift."""
    states = [
        pipeline.prepare(GenerationRequest("a", width=size, height=size)) for size in (16, 128)
    ]
    assert states[0].sampler.sigmas == states[1].sampler.sigmas
    path = folder_copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dynamic_shifting": True}))
    with pytest.raises(CheckpointError, match="use_dynamic_shifting True is not supported"):
        load_pipeline(folder_copy)


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "dpm"])
def test_one_shift_moves_every_solver(sampler):
    """The official script has two options for it, of which each solver heeds one."""
    options = {} if sampler == "dpm" else {"time_grid": "official"}
    plain, shifted = (
        np.array(make_sampler(sampler, num_inference_steps=4, shift=shift, **options).sigmas)
        for shift in (1.0, 6.0)
    )
    np.testing.assert_allclose(shifted, 6 * plain / (1 + 5 * plain), rtol=1e-12)


def test_two_requests_in_turns_do_not_disturb_each_other(pipeline):
    """A solver that counts its steps in a shared object, as diffusers' schedulers do, cannot."""
    requests = [
        GenerationRequest("a", sampler="dpm", num_inference_steps=3, seed=1),
        GenerationRequest("b", sampler="dpm", num_inference_steps=5, seed=2),
    ]
    alone = [pipeline.generate([request])[0][0] for request in requests]
    states = [pipeline.prepare(request) for request in requests]
    while running := [state for state in states if not state.finished]:
        for state in running:
            pipeline.denoise_step([state])
    for state, expected in zip(states, alone, strict=True):
        assert pipeline.decode([state])[0][0].tobytes() == expected.tobytes()


def test_the_marker_stands_between_template_and_prompt_once():
    """The official demo joins them without it, the script once more for every negative prompt."""
    for text in (
        compose_prompt("a cat", "base"),
        compose_negative("a cat", "base", None, with_template=True),
    ):
        assert text == f"{TEMPLATES['base']} <Prompt Start> a cat"


def test_names_behind_a_prefix_and_other_widths_are_read(tmp_path):
    """diffusers' converter of LoRAs fails on both; ours cuts rows where the config says."""
    config = NextDiTConfig(
        hidden_size=48, num_layers=1, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        axes_dim_rope=(4, 4, 4), cap_feat_dim=20, multiple_of=16,
    )  # fmt: skip
    pair = {"A": torch.ones(2, 48), "B": torch.ones(96, 2)}
    key = "model.diffusion_model.layers.0.attention.qkv.lora_{}.weight"
    state = {key.format(letter): tensor for letter, tensor in pair.items()}
    with pytest.raises((KeyError, RuntimeError)):
        _convert_non_diffusers_lumina2_lora_to_diffusers(dict(state))
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with pytest.raises((KeyError, RuntimeError)):
        _convert_non_diffusers_lumina2_lora_to_diffusers(bare)
    save_file(state, tmp_path / "x.safetensors")
    file = open_lora(tmp_path / "x.safetensors", config)
    change = file.read("layers.0.attention.qkv", device="cpu", dtype=torch.float32)
    assert torch.equal(change.a, pair["A"])
    assert torch.equal(change.b, pair["B"])


def test_qk_norm_has_the_eps_of_diffusers():
    theirs = Lumina2Transformer2DModel(
        hidden_size=24, num_attention_heads=2, num_kv_heads=1, num_layers=1, num_refiner_layers=1,
        multiple_of=8, axes_dim_rope=(4, 4, 4), cap_feat_dim=8, norm_eps=1e-2,
    )  # fmt: skip
    assert theirs.layers[0].attn.norm_q.eps == theirs.layers[0].attn.norm_k.eps == QK_NORM_EPS
    ours = Attention(
        NextDiTConfig(
            hidden_size=24, num_attention_heads=2, num_kv_heads=1, axes_dim_rope=(4, 4, 4),
            norm_eps=1e-2,
        )
    )  # fmt: skip
    assert ours.q_norm.eps == ours.k_norm.eps == QK_NORM_EPS == 1e-5


def test_a_config_without_caption_width_means_what_diffusers_means():
    theirs = inspect.signature(Lumina2Transformer2DModel.__init__).parameters["cap_feat_dim"]
    assert NextDiTConfig.from_dict({}).cap_feat_dim == theirs.default == 1024
    assert NextDiTConfig().cap_feat_dim == 2304


def test_guidance_acts_on_the_noisy_side_and_then_the_prompt_alone():
    """The paper's equation guides from alpha on and falls back to uncond: its code does neither."""
    guidance = Guidance(guidance_scale=4.0, cfg_trunc_t=0.25)
    assert [guidance.is_guided(0, 1, t) for t in (0.0, 0.2499, 0.25, 1.0)] == [
        True, True, False, False,
    ]  # fmt: skip


def test_after_truncation_the_conditional_branch_goes_on(pipeline):
    state = pipeline.prepare(GenerationRequest("a", num_inference_steps=2, cfg_trunc_ratio=0.5))
    pipeline.denoise_step([state])
    assert len(state.contexts()) == 1
    assert state.contexts()[0] is state.cond


def test_solver_state_stays_float32_in_low_precision(tiny_folder):
    """The official DPM keeps it in bfloat16, and diffusers rounds it after every step."""
    low = load_pipeline(tiny_folder, dtype=torch.bfloat16)
    state = low.prepare(GenerationRequest("a", sampler="dpm", num_inference_steps=3))
    while not state.finished:
        low.denoise_step([state])
        sample = state.samples[0]
        assert sample.latents.dtype == sample.memory.dtype == torch.float32


def test_noise_is_drawn_in_float32_whatever_the_network_computes_in(tiny_folder, pipeline):
    low = load_pipeline(tiny_folder, dtype=torch.bfloat16)
    request = GenerationRequest("a", seed=3)
    assert torch.equal(low.prepare(request).latents[0], pipeline.prepare(request).latents[0])


def test_dpm_ends_finite_because_its_last_step_is_first_order():
    sampler = make_sampler("dpm", num_inference_steps=6, shift=6.0)
    state = sampler.start(torch.randn(2, 4, 4))
    while state.evaluation < sampler.num_evaluations:
        state = sampler.step(state, torch.randn(2, 4, 4))
    assert torch.isfinite(state.latents).all()


def test_defaults_are_those_of_the_installed_diffusers(pipeline):
    call = inspect.signature(Lumina2Pipeline.__call__).parameters
    preset = pipeline.generation_config.presets["diffusers"]
    assert preset["num_inference_steps"] == call["num_inference_steps"].default == 30
    assert preset["guidance_scale"] == call["guidance_scale"].default == 4.0
    assert preset["cfg_trunc_ratio"] == call["cfg_trunc_ratio"].default == 1.0
    assert (preset["cfg_renorm"] == "row") is call["cfg_normalization"].default
