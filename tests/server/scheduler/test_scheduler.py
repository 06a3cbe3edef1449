import pytest

from server.scheduler.budget import MemoryCost, StepBudget
from server.scheduler.request import RunningRequest
from server.scheduler.scheduler import Remaining, Scheduler


def request(key, num_tokens=100, steps_left=2, **fields):
    return RunningRequest(key=key, num_tokens=num_tokens, steps_left=steps_left, **fields)


def scheduler(**limits):
    return Scheduler(**{"max_running": 4, "max_step_tokens": 250, **limits})


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
    s.add(request("a", num_tokens=200))
    s.add(request("b", num_tokens=200))
    batch = s.schedule()
    assert batch.keys == ("a",)
    s.complete_step(batch, {"a": Remaining(50, 1)})  # guidance has ended
    assert s.schedule().keys == ("a", "b")


def test_short_work_overtakes_between_steps_and_the_long_goes_on_where_it_was():
    s = scheduler(max_step_tokens=1000)
    s.add(request("long", num_tokens=1000, steps_left=50))
    batch = s.schedule()
    s.add(request("short", num_tokens=200, steps_left=1))
    s.complete_step(batch, {"long": Remaining(1000, 49)})
    batch = s.schedule()
    assert batch.keys == ("short",)
    assert s.complete_step(batch, {"short": Remaining(0, 0)}) == ["short"]
    assert s.schedule().keys == ("long",)


def test_the_clock_is_the_callers():
    now = 0.0
    s = scheduler(max_step_tokens=1000, clock=lambda: now)
    s.add(request("long", num_tokens=1000, steps_left=50))
    s.add(request("short", num_tokens=900, steps_left=2, submitted_at=10_000.0))
    now = 10_000.0
    assert s.schedule().keys == ("long",)


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


def test_a_burst_is_left_to_other_workers_too():
    assert scheduler(max_running=64).free_capacity().jobs == 4


def test_nothing_is_claimed_beside_a_solo_job():
    s = scheduler()
    s.add(request("poison", solo=True))
    assert s.free_capacity().jobs == 0


def test_a_worker_where_somebody_waits_still_claims():
    s = scheduler(max_cost_ms=500.0)
    for key in "abc":
        s.add(request(key, num_tokens=200, cost_ms=100.0))
    assert len(s.schedule().keys) == 1
    assert (s.free_capacity().jobs, s.free_capacity().cost_ms) == (1, 200.0)


def test_nothing_is_claimed_where_memory_is_taken():
    memory = MemoryCost(token_bytes=1, limit_bytes=300)
    s = scheduler(budget=StepBudget(250, memory=memory))
    s.add(request("a", num_tokens=100, held_bytes=100))
    assert s.free_capacity().jobs == 3
    s.add(request("b", num_tokens=100, held_bytes=150))
    assert s.free_capacity().jobs == 0


def test_work_done_makes_room():
    s = scheduler(max_cost_ms=500.0)
    s.add(request("a", steps_left=4, cost_ms=400.0))
    s.complete_step(s.schedule(), {"a": Remaining(100, 1)})
    assert s.free_capacity().cost_ms == pytest.approx(400.0)
