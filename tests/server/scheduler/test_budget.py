from functools import reduce

import pytest

from server.scheduler.budget import MemoryCost, StepBudget, StepCost
from server.scheduler.request import RunningRequest, StepLoad
from server.scheduler.simulate import H200


def load(tokens, sequences=1):
    return RunningRequest("a", tokens, 1, num_sequences=sequences).load


def test_pairs_are_counted_inside_sequences_only():
    assert load(200) == StepLoad(200, 40_000)
    assert load(200, 2) == StepLoad(200, 20_000)
    assert load(200, 2).plus(load(100)) == StepLoad(300, 30_000)


def test_the_cost_is_the_sum_of_its_terms():
    cost = StepCost(fixed_ms=1.0, root_ms=2.0, token_ms=0.5, pair_ms=0.01)
    assert cost.step_ms(load(100)) == pytest.approx(1 + 2 * 10 + 50 + 100)
    assert cost.step_ms(StepLoad()) == 0.0


def one(pixels):
    return load((pixels // 16) ** 2 + 100)


@pytest.mark.parametrize(
    ("pixels", "published_ms"), [(256, 4.1), (512, 10.5), (768, 21), (1024, 36.5), (1536, 97)]
)
def test_the_modelled_device_takes_the_times_it_was_fitted_to(pixels, published_ms):
    assert H200.cost.step_ms(one(pixels)) == pytest.approx(published_ms, rel=0.08)


@pytest.mark.parametrize(
    ("pixels", "count", "gain"), [(256, 8, 1.5), (512, 4, 1.2), (1024, 2, 1.06)]
)
def test_the_modelled_device_gains_by_packing_as_measured_elsewhere(pixels, count, gain):
    alone_ms = count * H200.cost.step_ms(one(pixels))
    together_ms = H200.cost.step_ms(reduce(StepLoad.plus, [one(pixels)] * count))
    assert alone_ms / together_ms == pytest.approx(gain, rel=0.04)


def test_tokens_bound_a_step():
    budget = StepBudget(250)
    assert budget.fits(load(250), 0)
    assert not budget.fits(load(251), 0)


def test_memory_bounds_a_step_together_with_what_is_held():
    budget = StepBudget(10_000, memory=MemoryCost(fixed_bytes=100, token_bytes=2, limit_bytes=1000))
    assert budget.fits(load(400), 100)
    assert not budget.fits(load(401), 100)
    assert not budget.fits(load(400), 101)


def test_after_an_out_of_memory_batches_are_half_as_large():
    budget = StepBudget(10_000)
    budget.shrink(600)
    assert budget.max_tokens == 300
    budget.shrink(5000)  # no reason to grow
    assert budget.max_tokens == 300
