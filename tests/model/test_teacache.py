import copy
import math

import numpy as np
import pytest
import torch

from model import GenerationRequest, load_pipeline
from model.cache_config import CacheConfig, SkipSchedule
from model.flow import timestep_from_sigma
from model.teacache import TeaCacheState, Threshold, estimated_change
from tests.model.conftest import max_difference

STEPS = 8
LINEAR = (0.0, 0.0, 0.0, 1.0, 0.0)  # the estimate is the measured change itself
V1 = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)  # the community port
PLAN = "11010011"
GRID = tuple(i / (6 * STEPS - 5 * i) for i in range(STEPS))


@pytest.fixture(scope="module")
def cached(pipeline):
    """The tiny checkpoint with a cache calibrated by hand."""
    plan = SkipSchedule("euler", GRID, tuple(letter == "1" for letter in PLAN), 6.0)
    with_cache = copy.copy(pipeline)
    with_cache.cache_config = CacheConfig(LINEAR, {"balanced": (plan,)})
    return with_cache


def request(prompt="a red circle", **settings):
    return GenerationRequest(
        prompt, **({"num_inference_steps": STEPS, "seed": 3, "cache": "balanced"} | settings)
    )


def run(pipeline, *requests, replay=None):
    states = [pipeline.prepare(each, replay=replay) for each in requests]
    while running := [state for state in states if not state.finished]:
        pipeline.denoise_step(running)
    return states


def by_hand(pipeline, asked, computes):
    """Final latents of one image, one sequence at a time; `computes(branch, step)` decides."""
    dit = pipeline.dit
    state = pipeline.prepare(asked)
    sampler, (sample,), residuals = state.sampler, state.samples, {}
    for step in range(sampler.num_evaluations):
        timestep = timestep_from_sigma(sampler.sigma_at(step))
        interval = sampler.interval_of(step)
        guided = state.guidance.is_guided(interval, sampler.num_intervals, timestep)
        velocities = []
        for branch, context in zip(("cond", "uncond")[: 1 + guided], (state.cond, state.uncond)):  # noqa: B905
            point = sampler.evaluation_point(sample)
            packed = dit.embed([point], torch.tensor([timestep]), [context])
            if computes(branch, step):
                after = dit.blocks(packed).hidden
                residuals[branch] = after - packed.hidden
            packed.hidden[:] = packed.hidden + residuals[branch]
            velocities += dit.head(packed)
        velocity = state.guidance.combine(*velocities) if guided else velocities[0]
        sample = sampler.step(sample, velocity)
    return sample.latents


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"cfg_trunc_ratio": 0.6},
        {"cfg_trunc_ratio": 0.5},
        {"negative_prompt": "a red circle", "system_prompt": "empty"},
        {"negative_prompt": "a red square", "system_prompt": "empty"},
        {"width": 96, "height": 32},
    ],
    ids=["full", "unguided", "ends on a skip", "ends", "same text", "equal length", "wide"],
)
@torch.inference_mode()
def test_a_skipped_step_adds_the_residual_of_the_branch(cached, settings):
    (state,) = run(cached, request(**settings))
    expected = by_hand(cached, request(**settings), lambda _, step: PLAN[step] == "1")
    torch.testing.assert_close(state.latents[0], expected, rtol=1e-4, atol=1e-4)
    uncached = run(cached, request(**settings, cache="off"))[0].latents[0]
    assert not torch.allclose(uncached, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", ["midpoint", "dpm"])
@torch.inference_mode()
def test_every_solver_can_skip(cached, sampler):
    asked = request(sampler=sampler)
    (state,) = run(cached, asked)
    plan = cached.prepare(asked).cache.default.computed
    assert len(plan) == state.num_steps
    assert 0 < plan.count(False) == state.num_steps - state.steps_computed
    expected = by_hand(cached, asked, lambda _, step: plan[step])
    torch.testing.assert_close(state.latents[0], expected, rtol=1e-4, atol=1e-4)


def test_steps_and_branches_are_counted(cached):
    (state,) = run(cached, request(cfg_trunc_ratio=0.5))
    assert state.steps_computed == PLAN.count("1") == 5
    assert state.steps_cfg == 4
    assert state.nfe == 2 * PLAN[:4].count("1") + PLAN[4:].count("1")
    assert state.cache_decisions == {}  # a schedule is no decision


def test_the_joint_blocks_see_only_what_computes(cached):
    seen, embedded = [], []
    hooks = [
        cached.dit.layers[-1].register_forward_hook(lambda _, args, __: seen.append(len(args[0]))),
        cached.dit.final_layer.register_forward_hook(
            lambda _, args, __: embedded.append(len(args[0]))
        ),
    ]
    try:
        run(cached, request(), request(cache="off", width=32))
        run(cached, request())
    finally:
        for hook in hooks:
            hook.remove()
    states = [cached.prepare(request()), cached.prepare(request(cache="off", width=32))]
    skipper, other = (state.num_tokens for state in states)
    assert seen[:STEPS] == [other + skipper * int(letter) for letter in PLAN]
    assert seen[STEPS:] == [skipper] * PLAN.count("1")  # an all-skipped step runs no block
    assert embedded == [skipper + other] * STEPS + [skipper] * STEPS


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@torch.inference_mode()
def test_a_threshold_decides_for_every_branch_by_itself(cached, threshold):
    asked = request(cache=threshold, guidance_scale=2.0)
    (state,) = run(cached, asked)
    decisions = state.cache_decisions
    assert set(decisions) == {"0/cond", "0/uncond"}
    for letters in decisions.values():
        assert len(letters) == STEPS
        assert letters[0] == letters[-1] == "1"
    expected = by_hand(cached, asked, lambda branch, step: decisions[f"0/{branch}"][step] == "1")
    torch.testing.assert_close(state.latents[0], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_change_is_that_of_the_modulated_input(cached):
    """Recomputed in float64 from the weights, along a run in which nothing is skipped."""
    dit = cached.dit
    state = cached.prepare(request(cache=1e-12, guidance_scale=1.0))
    block, before = dit.layers[0], None
    expected = []
    while not state.finished:
        time = torch.tensor([state.timestep])
        packed = dit.embed(state.latents, time, [state.cond])
        h = packed.hidden.double()
        scale = block.modulation(packed.time_embedding).double()[:, : h.shape[1]]
        m = h / (h.square().mean(-1, keepdim=True) + block.attention_norm1.eps).sqrt()
        m = m * block.attention_norm1.weight.double() * (1 + scale)
        expected.append(
            None if before is None else float((m - before).abs().mean() / before.abs().mean())
        )
        before = m
        cached.denoise_step([state])
    (compared,) = (s.compared for s in state.cache.states.values())
    assert compared[0] is compared[-1] is None
    assert compared[1:-1] == pytest.approx(expected[1:-1], rel=1e-4)
    assert state.steps_computed == STEPS


def test_the_estimate_is_the_polynomial_clamped_at_zero():
    for change in np.linspace(0, 0.5, 40):
        expected = float(np.polyval(V1, change))
        assert estimated_change(V1, change) == pytest.approx(max(0.0, expected))
    assert estimated_change(V1, 0.4) == 0.0


def test_the_estimates_of_skipped_steps_add_up():
    rule = Threshold(0.25, LINEAR, 10)
    state = TeaCacheState(residual=torch.zeros(1, 1))
    for step, change in enumerate([None, 0.1, 0.1, 0.1, 0.2, 0.04, 0.3, math.nan, 0.0, 0.0]):
        state = rule.decide(state, step, change)
    assert state.decisions == "1001001101"
    assert state.compared[:4] == (None, 0.1, 0.2, pytest.approx(0.3))
    assert state.compared[4] == 0.2


def test_an_infinite_threshold_computes_the_first_and_the_last_step(cached):
    (state,) = run(cached, request(cache=10.0))
    assert set(state.cache_decisions.values()) == {"1" + "0" * (STEPS - 2) + "1"}
    assert (state.steps_computed, state.nfe) == (2, 4)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(cached, steps):
    (state,) = run(cached, request(cache=10.0, num_inference_steps=steps))
    assert state.steps_computed == min(steps, 2)


def test_threshold_zero_is_no_cache(cached):
    zero, off = run(cached, request(cache=0), request(cache="off"))
    assert zero.steps_computed == STEPS
    assert torch.equal(zero.latents[0], off.latents[0])


def test_every_picture_of_a_request_decides_for_itself(cached):
    (pair,) = run(cached, request(cache=0.2, num_images=2))
    (second,) = run(cached, request(cache=0.2, seed=4))
    assert pair.cache_decisions["1/cond"] == second.cache_decisions["0/cond"]
    assert max_difference(*(cached.decode([s])[0][-1] for s in (pair, second))) <= 1


def test_replayed_decisions_give_the_same_picture(cached):
    asked = request(cache=0.2, cfg_trunc_ratio=0.6)
    (state,) = run(cached, asked)
    decisions = state.cache_decisions
    assert len(decisions["0/uncond"]) < len(decisions["0/cond"]) == STEPS
    (again,) = run(cached, asked, replay=decisions)
    assert torch.equal(again.latents[0], state.latents[0])
    assert (again.nfe, again.steps_computed) == (state.nfe, state.steps_computed)


@pytest.mark.parametrize(
    "replay",
    [{"0": "1"}, {"x/cond": "1"}, {"0/both": "1"}, {"0/cond": "01"}, {"0/cond": "1" * 9},
     {"0/cond": "1x"}, {"0/cond": ""}],
    ids=str,
)  # fmt: skip
def test_decisions_that_do_not_fit_are_refused(cached, replay):
    with pytest.raises(ValueError, match=r"decisions of '.*' are not allowed: give"):
        cached.prepare(request(), replay=replay)


@pytest.mark.parametrize("cache", ["balanced", "fast", 0.25])
def test_without_a_calibration_nothing_is_skipped_and_a_warning_says_so(pipeline, cache):
    asked = request(cache=cache)
    cached_run, off = run(pipeline, asked, request(cache="off"))
    (warning,) = cached_run.warnings
    assert warning == f"cache {cache} has no effect: this checkpoint is not calibrated for it"
    assert off.warnings == []
    assert torch.equal(cached_run.latents[0], off.latents[0])


def test_a_preset_the_file_lacks_is_a_warning_too(cached):
    state = cached.prepare(request(cache="fast"))
    assert state.cache is None
    assert state.warnings[0].startswith("cache fast has no effect")


def test_a_failed_forward_changes_no_cache(cached):
    state = cached.prepare(request(cache=0.2))
    for _ in range(3):
        cached.denoise_step([state])
    other = cached.prepare(request())
    other.cond = other.cond[:, :3]
    before = dict(state.cache.states)
    with pytest.raises((RuntimeError, ValueError)):
        cached.denoise_step([state, other])
    assert state.cache.states == before
    assert state.step_index == 3


def test_a_branch_that_has_ended_keeps_no_tensors(cached):
    state = cached.prepare(request(cache=0.2, cfg_trunc_ratio=0.5))
    while not state.finished:
        cached.denoise_step([state])
        ended = state.cache.states.get((0, "uncond"))
        assert state.step_index <= 4 or (ended.signal is None and ended.residual is None)
    assert all(s.signal is None and s.residual is None for s in state.cache.states.values())


CROWD = [
    {"cache": "balanced"},
    {"cache": 0.2, "num_images": 2},
    {"cache": "off", "width": 32},
    {"cache": "balanced", "num_inference_steps": 5, "sampler": "midpoint", "cfg_trunc_t": 0.2},
    {"cache": 0.1, "num_inference_steps": 11, "sampler": "dpm", "guidance_scale": 1.0},
    {"cache": "balanced", "prompt": "a red circle b", "height": 48, "cfg_trunc_ratio": 0.5},
]


def test_alone_or_in_a_crowd(cached):
    asked = [request(**settings) for settings in CROWD]
    together = run(cached, *asked)
    for state, each in zip(together, asked, strict=True):
        replay = state.cache_decisions or None
        (alone,) = run(cached, each, replay=replay)
        for image, expected in zip(
            cached.decode([state])[0], cached.decode([alone])[0], strict=True
        ):
            assert max_difference(image, expected) <= 1


def test_the_loader_finds_the_file(folder_copy):
    (folder_copy / "teacache.json").write_text('{"coefficients": [0, 0, 0, 1, 0]}')
    loaded = load_pipeline(folder_copy)
    assert loaded.cache_config.coefficients == LINEAR
    state = loaded.prepare(request(cache=0.2))
    assert isinstance(state.cache.default, Threshold)
