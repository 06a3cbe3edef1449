from itertools import pairwise

import pytest

from server.scheduler.request import MOVES, RunningRequest, State


def request(**fields):
    return RunningRequest(**{"key": "a", "num_tokens": 100, "steps_left": 4, **fields})


def test_a_request_steps_until_none_is_left():
    r = request(steps_left=2)
    for left, state in ((1, State.READY), (0, State.FINISHED)):
        r.move(State.STEPPING)
        r.end_step(50, 1, left)
        assert (r.state, r.num_tokens, r.steps_left) == (state, 50, left)


def test_what_is_left_shrinks_with_the_steps():
    r = request(total_ms=80.0)
    r.move(State.STEPPING)
    r.end_step(100, 2, 3)
    assert r.left_ms == pytest.approx(60.0)


@pytest.mark.parametrize("final", [State.FINISHED, State.FAILED, State.ABORTED])
def test_final_states_are_final(final):
    assert MOVES[final] == frozenset()


@pytest.mark.parametrize(
    "path",
    [
        (State.READY, State.FINISHED),
        (State.READY, State.FAILED),
        (State.STEPPING, State.ABORTED),  # a step in flight is never cut off
        (State.STEPPING, State.STEPPING),
    ],
)
def test_shortcuts_are_refused(path):
    r = request(state=path[0])
    for _, state in pairwise(path):
        with pytest.raises(AssertionError):
            r.move(state)
