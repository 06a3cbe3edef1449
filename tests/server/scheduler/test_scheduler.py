import pytest

from server.scheduler.policy import choose
from server.scheduler.request import RunningRequest
from server.scheduler.scheduler import Remaining, Scheduler


def request(key, num_tokens=100, steps_left=2, **fields):
    return RunningRequest(key=key, num_tokens=num_tokens, steps_left=steps_left, **fields)


def scheduler(**limits):
    return Scheduler(**{"max_running": 4, "max_step_tokens": 250, **limits})


@pytest.mark.parametrize(
    ("tokens", "chosen"),
    [
        ([], []),
        ([100, 100, 100], [0, 1]),
        ([900, 1, 1], [0]),
        ([100, 900, 150], [0, 2]),
        ([50, 50, 50, 50, 50], [0, 1, 2, 3, 4]),
    ],
)
def test_the_oldest_steps_and_what_fits_beside_it(tokens, chosen):
    waiting = [request(str(i), n) for i, n in enumerate(tokens)]
    assert [int(r.key) for r in choose(waiting, 250)] == chosen


def test_requests_leave_after_their_last_step():
    s = scheduler()
    s.add(request("a", steps_left=1))
    s.add(request("b", steps_left=2))
    batch = s.schedule()
    assert batch.keys == ("a", "b")
    assert s.complete_step(batch, {"a": Remaining(0, 0), "b": Remaining(100, 1)}) == ["a"]
    assert "a" not in s
    batch = s.schedule()
    assert batch.keys == ("b",)
    assert s.complete_step(batch, {"b": Remaining(0, 0)}) == ["b"]
    assert s.schedule().keys == ()


def test_a_failed_member_is_forgotten_and_no_other():
    s = scheduler()
    s.add(request("a"))
    s.add(request("b"))
    batch = s.schedule()
    assert s.complete_step(batch, {"b": Remaining(100, 1)}) == []
    assert "a" not in s
    assert "b" in s


def test_a_request_that_gets_cheaper_makes_room():
    s = scheduler()
    s.add(request("guided", num_tokens=200))
    s.add(request("young", num_tokens=100))
    batch = s.schedule()
    assert batch.keys == ("guided",)
    s.complete_step(batch, {"guided": Remaining(100, 1)})
    assert s.schedule().keys == ("guided", "young")


def test_abort_works_between_steps():
    s = scheduler()
    s.add(request("a"))
    assert s.abort("a")
    assert not s.abort("a")
    assert s.schedule().keys == ()


def test_an_idle_worker_has_all_its_room():
    capacity = scheduler(max_cost_ms=500.0).free_capacity()
    assert (capacity.jobs, capacity.cost_ms, capacity.idle) == (4, 500.0, True)


def test_room_shrinks_with_what_is_held():
    s = scheduler(max_cost_ms=500.0)
    s.add(request("a", cost_ms=200.0))
    capacity = s.free_capacity()
    assert (capacity.jobs, capacity.cost_ms, capacity.idle) == (3, 300.0, False)
    s.add(request("b", cost_ms=300.0))
    assert s.free_capacity().jobs == 0


def test_nothing_is_claimed_beside_a_solo_job():
    s = scheduler()
    s.add(request("poison", solo=True))
    assert s.free_capacity().jobs == 0


def test_nothing_is_claimed_while_somebody_waits_for_tokens():
    s = scheduler()
    for key in "abc":
        s.add(request(key))
    batch = s.schedule()
    s.complete_step(batch, {key: Remaining(100, 1) for key in batch.keys})
    assert s.free_capacity().jobs == 0
