import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from model.flow import velocity_target
from model.samplers import SAMPLERS, SamplerState, make_sampler, make_sigmas


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_diffusers_grid_equals_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    np.testing.assert_allclose(make_sigmas("diffusers", steps, shift), scheduler.sigmas, atol=1e-6)


def test_diffusers_grid_closed_form():
    timesteps = [1 - sigma for sigma in make_sigmas("diffusers", 10, 6.0)]
    expected = [i / (60 - 5 * i) for i in range(10)] + [1.0]
    np.testing.assert_allclose(timesteps, expected, atol=1e-12)


def test_official_grid_counts_points():
    t = np.linspace(0, 1, 18)
    expected = 1 - t / (t + 6.0 - 6.0 * t)
    np.testing.assert_allclose(make_sigmas("official", 18, 6.0), expected, atol=1e-12)
    assert make_sigmas("official", 11, 6.0) == make_sigmas("diffusers", 10, 6.0)


def test_official_grid_needs_two_points():
    with pytest.raises(ValueError, match=r"num_inference_steps 1 .*'official': give 2 or more"):
        make_sigmas("official", 1, 6.0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_straight_path_ends_at_the_data(name):
    data, noise = torch.randn(4, 6, 6), torch.randn(4, 6, 6)
    sampler = make_sampler(name, time_grid="diffusers", num_inference_steps=7, shift=6.0)
    state = sampler.start(noise)
    while state.evaluation < sampler.num_evaluations:
        assert torch.isfinite(sampler.evaluation_point(state)).all()
        state = sampler.step(state, velocity_target(data, noise))
    torch.testing.assert_close(state.latents, data, atol=1e-5, rtol=1e-5)


def test_euler_equals_diffusers_step_by_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5))
    sampler = make_sampler("euler", time_grid="diffusers", num_inference_steps=5, shift=6.0)
    theirs = torch.randn(1, 4, 6, 6)
    state = sampler.start(theirs[0])
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * theirs + i)
        assert sampler.sigma_at(i) == pytest.approx(float(timestep) / 1000, abs=1e-6)
        theirs = scheduler.step(-velocity, timestep, theirs, return_dict=False)[0]
        state = sampler.step(state, velocity[0])
        torch.testing.assert_close(state.latents, theirs[0], atol=2e-6, rtol=1e-5)


def test_step_is_pure_and_keeps_float32():
    sampler = make_sampler("euler", time_grid="diffusers", num_inference_steps=3, shift=6.0)
    state = SamplerState(latents=torch.ones(1, 2, 2))
    after = sampler.step(state, torch.ones(1, 2, 2, dtype=torch.bfloat16))
    assert after.latents.dtype == torch.float32
    assert after.evaluation == 1
    assert state.evaluation == 0
    assert torch.equal(state.latents, torch.ones(1, 2, 2))
