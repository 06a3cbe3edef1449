import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from model.flow import interpolate, velocity_target
from model.samplers import SAMPLERS, SamplerState, make_dpm_sigmas, make_sampler, make_sigmas
from model.samplers.sigmas import shift_sigma

GRIDS = ("diffusers", "official")


def sampler_of(name, steps, *, time_grid="diffusers", shift=6.0):
    return make_sampler(name, time_grid=time_grid, num_inference_steps=steps, shift=shift)


def integrate(sampler, start, velocity, intervals=None):
    """Run a sampler on `velocity(x, t)`, with t = 1 - sigma, over all or the first intervals."""
    state = sampler.start(start)
    intervals = intervals or sampler.num_intervals
    while sampler.interval_of(state.evaluation) < intervals:
        t = 1.0 - sampler.sigma_at(state.evaluation)
        state = sampler.step(state, velocity(sampler.evaluation_point(state), t))
    return state.latents


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


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_dpm_grid_closed_form(steps):
    beta = np.linspace(1, 0.001, steps + 1)
    expected = np.flip(6.0 * (1 - beta) / (1 + 5.0 * (1 - beta)))
    np.testing.assert_allclose(make_dpm_sigmas(steps, 6.0), expected, atol=1e-12)
    assert make_dpm_sigmas(20, 6.0)[0] == pytest.approx(0.99983, abs=1e-5)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("time_grid", GRIDS)
def test_straight_path_ends_at_the_data(name, time_grid):
    data, noise = torch.randn(4, 6, 6), torch.randn(4, 6, 6)
    sampler = sampler_of(name, 7, time_grid=time_grid)
    start = interpolate(data, noise, torch.tensor(1 - sampler.sigmas[0]))
    end = integrate(sampler, start, lambda x, t: velocity_target(data, noise))
    torch.testing.assert_close(end, data, atol=1e-5, rtol=1e-5)


def relaxation(x, t):
    """``x' = 3t - 2x``: neither straight nor constant, and solved by hand below."""
    return 3.0 * t - 2.0 * x


def relaxation_solved(x, t0, t):
    """Exact solution at t of `relaxation` from x at t0."""
    c = (x - 1.5 * t0 + 0.75) * math.exp(2 * t0)
    return 1.5 * t - 0.75 + c * math.exp(-2 * t)


# Factor by which the error falls when the steps double: 2 to the power of the order. Measured away
# from both ends, on steps of equal length in log SNR: at the ends dpm's are infinitely long.
@pytest.mark.parametrize(("name", "factor"), [("euler", 2.0), ("midpoint", 4.0), ("dpm", 4.0)])
def test_order_of_convergence(name, factor):
    errors = []
    for steps in (60, 120):
        sigmas = 1 / (1 + np.exp(np.linspace(-2.0, 3.0, steps + 1)))
        sampler = make_sampler(name, sigmas=sigmas.tolist())
        start = torch.tensor([1.7], dtype=torch.float64)
        exact = relaxation_solved(start, 1 - sigmas[0], 1 - sigmas[-1])
        errors.append(float((integrate(sampler, start, relaxation, steps) - exact).abs()))
    assert errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("time_grid", GRIDS)
def test_every_grid_leads_to_the_exact_solution(name, time_grid):
    sampler = sampler_of(name, 400, time_grid=time_grid)
    start = torch.tensor([1.7], dtype=torch.float64)
    exact = relaxation_solved(start, 1 - sampler.sigmas[0], 1.0)
    assert integrate(sampler, start, relaxation) == pytest.approx(exact, abs=0.01)


def swirl(x, t):
    """A velocity that bends and depends on time, elementwise, for tensors and arrays alike."""
    sine = torch.sin if isinstance(x, torch.Tensor) else np.sin
    return sine(3.0 * x + 5.0 * t) - 0.5 * x


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 20])
def test_dpm_equals_the_published_formulas(steps):
    """DPM-Solver++ 2M written out in numpy, float64."""
    beta = np.linspace(1, 0.001, steps + 1)
    sigma = np.flip(6 * (1 - beta) / (1 + 5 * (1 - beta)))
    with np.errstate(divide="ignore"):
        lam = np.log((1 - sigma) / sigma)
    x = np.random.default_rng(0).normal(size=(4, 3, 3))
    before = None
    start = torch.from_numpy(x.copy())
    for i in range(steps):
        now = x + sigma[i] * swirl(x, 1 - sigma[i])
        mixed = now
        if 0 < i < steps - 1:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            mixed = now + (now - before) / (2 * r)
        x = sigma[i + 1] / sigma[i] * x + (1 - sigma[i + 1] / sigma[i]) * mixed
        before = now
    ours = integrate(sampler_of("dpm", steps), start, swirl)
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 8, 20])
@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_dpm_equals_diffusers_step_by_step(steps, shift):
    """Its multistep scheduler, told of flows, has the official solver's grid and formulas."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, about diffusers
        scheduler.set_timesteps(steps)
    sampler = sampler_of("dpm", steps, shift=shift)
    np.testing.assert_allclose(sampler.sigmas, scheduler.sigmas, atol=1e-6)
    theirs = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(steps))
    state = sampler.start(theirs[0])
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = swirl(theirs, 1 - sampler.sigma_at(i))
        theirs = scheduler.step(-velocity, timestep, theirs, return_dict=False)[0]
        state = sampler.step(state, velocity[0])
        torch.testing.assert_close(state.latents, theirs[0], atol=2e-5, rtol=2e-5)


def test_dpm_of_first_order_is_euler_and_the_second_order_shows():
    start = torch.randn(3, 4, 4, dtype=torch.float64)
    sigmas = make_dpm_sigmas(12, 6.0)[:-1]
    for count, same in ((1, True), (12, False)):
        dpm, euler = (
            integrate(make_sampler(name, sigmas=sigmas[:count]), start, swirl)
            for name in ("dpm", "euler")
        )
        assert torch.allclose(dpm, euler, rtol=1e-12) is same


def test_dpm_from_pure_noise_stays_finite():
    """Custom sigmas may begin at 1, where the log SNR is infinite: one more first-order step."""
    sigmas = (1.0, 0.9, 0.6, 0.3)
    start = torch.randn(3, 4, 4, dtype=torch.float64)
    dpm, euler = make_sampler("dpm", sigmas=sigmas), make_sampler("euler", sigmas=sigmas)
    states = [sampler.start(start) for sampler in (dpm, euler)]
    for step, same in enumerate((True, True, False, False)):
        states = [
            s.step(x, swirl(x.latents, 1 - sigmas[step]))
            for s, x in zip((dpm, euler), states, strict=True)
        ]
        assert torch.isfinite(states[0].latents).all()
        assert torch.allclose(states[0].latents, states[1].latents, rtol=1e-12) is same


@pytest.mark.parametrize("time_grid", GRIDS)
def test_midpoint_equals_the_rule_written_out(time_grid):
    t = [1 - sigma for sigma in make_sigmas(time_grid, 6, 6.0)]
    x = np.random.default_rng(1).normal(size=(4, 3, 3))
    start = torch.from_numpy(x.copy())
    for left, right in pairwise(t):
        half = x + 0.5 * (right - left) * swirl(x, left)
        x = x + (right - left) * swirl(half, 0.5 * (left + right))
    ours = integrate(sampler_of("midpoint", 6, time_grid=time_grid), start, swirl)
    np.testing.assert_allclose(ours.numpy(), x, rtol=1e-12, atol=1e-12)


def test_midpoint_knows_where_it_stands():
    sampler = sampler_of("midpoint", 18, time_grid="official")
    assert (sampler.num_intervals, sampler.num_evaluations) == (17, 34)
    assert [sampler.interval_of(k) for k in range(4)] == [0, 0, 1, 1]
    left, right = sampler.sigmas[3:5]
    assert [sampler.sigma_at(k) for k in (6, 7, 8)] == [left, (left + right) / 2, right]
    assert sampler.sigma_at(sampler.num_evaluations) == 0.0
    noise = torch.randn(2, 3, 3)
    half = sampler.step(sampler.start(noise), torch.ones(2, 3, 3))
    assert torch.equal(half.latents, noise)
    assert not torch.equal(sampler.evaluation_point(half), noise)
    assert sampler.step(half, torch.ones(2, 3, 3)).memory is None


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 9), ("midpoint", 18), ("dpm", 10)])
def test_evaluations_on_the_official_grid(name, evaluations):
    assert sampler_of(name, 10, time_grid="official").num_evaluations == evaluations


@pytest.mark.parametrize("steps", [5, 30])
def test_euler_equals_diffusers_step_by_step(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    sampler = sampler_of("euler", steps)
    theirs = torch.randn(1, 4, 6, 6)
    state = sampler.start(theirs[0])
    for i, timestep in enumerate(scheduler.timesteps):
        velocity = torch.sin(3 * theirs + i)
        assert sampler.sigma_at(i) == pytest.approx(float(timestep) / 1000, abs=1e-6)
        theirs = scheduler.step(-velocity, timestep, theirs, return_dict=False)[0]
        state = sampler.step(state, velocity[0])
        torch.testing.assert_close(state.latents, theirs[0], atol=2e-6, rtol=1e-5)


def test_custom_sigmas_are_taken_as_they_are():
    """diffusers shifts the sigmas it is given; ours are the shifted ones already."""
    given = (1.0, 0.7, 0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(sigmas=list(given))
    shifted = [shift_sigma(sigma, 6.0) for sigma in given]
    ours = make_sampler("euler", sigmas=shifted)
    np.testing.assert_allclose(ours.sigmas, scheduler.sigmas, atol=1e-6)
    assert make_sampler("euler", sigmas=given).sigmas == (*given, 0.0)
    assert make_sampler("midpoint", sigmas=given).num_evaluations == 6


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_step_is_pure_and_keeps_float32(name):
    sampler = sampler_of(name, 3)
    state = SamplerState(latents=torch.ones(1, 2, 2))
    seen = state
    for evaluation in range(sampler.num_evaluations):
        before = [None if x is None else x.clone() for x in (seen.latents, seen.memory)]
        after = sampler.step(seen, torch.ones(1, 2, 2, dtype=torch.bfloat16))
        assert after.latents.dtype == torch.float32
        assert after.evaluation == evaluation + 1
        assert seen.evaluation == evaluation
        for now, was in zip((seen.latents, seen.memory), before, strict=True):
            assert now is was if was is None else torch.equal(now, was)
        seen = after
    assert torch.equal(state.latents, torch.ones(1, 2, 2))
