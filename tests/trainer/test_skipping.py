import itertools

import numpy as np
import pytest
import torch

from model import GenerationRequest, load_pipeline
from tests.tiny_checkpoint import make_tiny_checkpoint
from trainer.skipping import best_schedule, fit_polynomial, record


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return load_pipeline(make_tiny_checkpoint(tmp_path_factory.mktemp("skipping") / "tiny"))


def cost_of(costs, computed):
    total, last = 0.0, 0
    for step, computes in enumerate(computed):
        last = step if computes else last
        total += 0.0 if computes else costs[last, step]
    return total


@pytest.mark.parametrize("num_computed", [2, 3, 5, 8])
def test_the_best_schedule_is_the_best_of_all(num_computed):
    costs = np.triu(np.random.default_rng(num_computed).random((8, 8)), 1)
    every = [
        (True, *middle, True)
        for middle in itertools.product((False, True), repeat=6)
        if sum(middle) == num_computed - 2
    ]
    found = best_schedule(costs, num_computed)
    assert sum(found) == num_computed
    assert cost_of(costs, found) == pytest.approx(min(cost_of(costs, each) for each in every))


@pytest.mark.parametrize(("steps", "wanted", "computed"), [(1, 5, 1), (2, 0, 2), (4, 9, 4)])
def test_the_first_and_the_last_step_compute(steps, wanted, computed):
    found = best_schedule(np.zeros((steps, steps)), wanted)
    assert sum(found) == computed
    assert found[0]
    assert found[-1]


def test_a_polynomial_is_found_again():
    expected = [-106.0, 47.0, -7.4, 1.5, -0.002]
    x = np.linspace(0.02, 0.26, 200)
    coefficients, explained = fit_polynomial(list(x), list(np.polyval(expected, x)))
    assert coefficients == pytest.approx(expected, rel=1e-4)
    assert explained == pytest.approx(1.0)


def test_noise_is_not_explained():
    chance = np.random.default_rng(0)
    _, explained = fit_polynomial(list(chance.random(500)), list(chance.random(500)))
    assert explained < 0.1


def test_too_few_changes_are_refused():
    with pytest.raises(ValueError, match="3 recorded changes are too few"):
        fit_polynomial([0.1, 0.2, 0.3, 0.1, float("nan")], [1.0, 2.0, 3.0, 1.0, 1.0])


@torch.inference_mode()
def test_a_cost_is_the_error_of_the_guided_residual(pipeline):
    """One picture, recomputed from the stages of the network."""
    asked = GenerationRequest("a red dot", seed=1, num_inference_steps=4, cfg_trunc_ratio=0.5)
    recorded = record(pipeline, [asked])
    assert len(recorded.input_changes) == len(recorded.output_changes) == 3 + 1  # cond and uncond

    state, residuals = pipeline.prepare(asked), []
    while not state.finished:
        kept = []
        for context in state.contexts():
            packed = pipeline.dit.embed(state.latents, torch.tensor([state.timestep]), [context])
            residual = pipeline.dit.blocks(packed).hidden - packed.hidden
            kept.append(residual[-state.tokens_per_image :])
        residuals.append(kept)
        pipeline.denoise_step([state])
    sigmas = state.sampler.sigmas
    for i, j in ((0, 1), (0, 3), (2, 3)):
        change = [a - b for a, b in zip(residuals[i], residuals[j], strict=False)]
        error = change[0] if len(change) == 1 else change[1] + 4.0 * (change[0] - change[1])
        expected = (sigmas[j] - sigmas[j + 1]) * float(error.abs().mean())
        assert recorded.costs[i, j] == pytest.approx(expected, rel=1e-3)
    assert not np.tril(recorded.costs).any()
