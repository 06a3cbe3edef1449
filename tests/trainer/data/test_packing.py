import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import plan_packs


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=24),
    st.integers(100, 400),
    st.sampled_from([1, 2, 3]),
)
def test_every_example_once_within_the_budget_and_equally_many_forwards(tokens, budget, processes):
    tokens = tokens * processes
    plan = plan_packs(tokens, budget, processes)
    assert len(plan) == processes
    assert len({len(forwards) for forwards in plan}) == 1
    packs = [pack for forwards in plan for pack in forwards]
    assert sorted(place for pack in packs for place in pack) == list(range(len(tokens)))
    assert all(pack and sum(tokens[i] for i in pack) <= budget for pack in packs)


def test_as_few_forwards_as_hold_it_evenly_loaded():
    tokens = [256 + i % 40 for i in range(64)]
    plan = plan_packs(tokens, 5000, 2)
    assert len(plan[0]) == -(-sum(tokens) // 10_000)
    loads = [sum(tokens[i] for i in pack) for forwards in plan for pack in forwards]
    assert max(loads) - min(loads) <= max(tokens)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="micro_tokens 9 cannot hold an example of 10 tokens"):
        plan_packs([10, 3], 9, 1)
    with pytest.raises(ValueError, match="batch_images 3 must be a multiple of"):
        plan_packs([1, 1, 1], 9, 2)
