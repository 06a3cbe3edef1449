import numpy as np
import pytest

from benchmarks import bench_training
from trainer.data.packing import plan_packs


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_example_once_within_the_budget_and_equally_many_forwards(processes):
    rng = np.random.default_rng(processes)
    for _ in range(150):
        count = processes * int(rng.integers(1, 25))
        tokens = [int(n) for n in rng.integers(1, 101, count)]
        budget = int(rng.integers(100, 400))
        plan = plan_packs(tokens, budget, processes)
        assert len(plan) == processes
        assert len({len(forwards) for forwards in plan}) == 1
        packs = [pack for forwards in plan for pack in forwards]
        assert sorted(place for pack in packs for place in pack) == list(range(count))
        assert all(pack and sum(tokens[i] for i in pack) <= budget for pack in packs)


def test_as_few_forwards_as_hold_it_evenly_loaded():
    tokens = [256 + i % 40 for i in range(64)]
    plan = plan_packs(tokens, 5000, 2)
    assert len(plan[0]) == -(-sum(tokens) // 10_000)
    loads = [sum(tokens[i] for i in pack) for forwards in plan for pack in forwards]
    assert max(loads) - min(loads) <= max(tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_packing_saves_a_third_of_the_work_at_least(seed):
    """Tokens through the network, to which its matrix products are proportional.

    `make bench-training` measures the time.
    """
    sides = bench_training.batches(bench_training.ragged_mix(32, seed=seed), 2048)
    work = bench_training.computed_tokens(sides)
    assert work["packed"] < 2048 * len(sides["packed"])
    assert work["padded"] > 1.3 * work["packed"]


def test_the_padded_side_of_the_benchmark_is_a_rectangle_of_the_same_examples():
    examples = bench_training.ragged_mix(24)
    sides = bench_training.batches(examples, 1024)
    for groups in sides.values():
        assert sum(len(group) for group in groups) == 24
        assert all(sum(map(bench_training.tokens, group)) <= 1024 for group in groups)
    for group in sides["padded"]:
        assert len({(latents.shape, features.shape) for latents, features in group}) == 1


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="micro_tokens 9 cannot hold an example of 10 tokens"):
        plan_packs([10, 3], 9, 1)
    with pytest.raises(ValueError, match="batch_images 3 must be a multiple of"):
        plan_packs([1, 1, 1], 9, 2)
