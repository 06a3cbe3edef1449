"""The policy's choices, one rule each. Costs: 1 ms a token unless a test says otherwise."""

import pytest

from server.scheduler.budget import MemoryCost, StepBudget, StepCost
from server.scheduler.policy import EarliestDue, Moment
from server.scheduler.request import RunningRequest

NO_GAIN = StepCost(fixed_ms=0.0, token_ms=1.0)
ALL_FIXED = StepCost(fixed_ms=100.0, token_ms=0.01)
TYPICAL_MS = 1000.0  # ten steps of 100 tokens


def request(key, tokens=100, steps=10, cost=NO_GAIN, **fields):
    r = RunningRequest(key=key, num_tokens=tokens, steps_left=steps, **fields)
    r.solo_ms = cost.step_ms(r.load)
    r.total_ms = steps * r.solo_ms
    return r


def chosen(*requests, now=0.0, cost=NO_GAIN, max_tokens=10_000, memory=None, policy=None, held=0):
    budget, policy = StepBudget(max_tokens, cost, memory), policy or EarliestDue()
    moment = Moment(now, TYPICAL_MS, held)
    return [r.key for r in policy.choose(requests, budget, moment)]


def test_nobody_waits_nobody_steps():
    assert chosen() == []


def test_the_shorter_goes_first():
    assert chosen(request("long", 400), request("short", 20)) == ["short"]


def test_equal_work_goes_in_order_of_arrival():
    assert chosen(request("b", submitted_at=1.0), request("a", submitted_at=2.0), now=3.0) == ["b"]


def test_long_work_overtakes_short_work_that_comes_after_its_patience():
    policy = EarliestDue()
    long = request("long", 400)
    last = policy.patience * TYPICAL_MS / 1000
    before, after = (request("short", 20, submitted_at=s) for s in (last / 2, 1.01 * last))
    assert chosen(long, before, now=1.1 * last) == ["short"]
    assert chosen(long, after, now=1.1 * last) == ["long"]


@pytest.mark.parametrize(("high", "low"), [("high", "normal"), ("normal", "low"), ("high", "low")])
def test_priority_comes_before_length(high, low):
    assert chosen(request("a", 20, priority=low), request("b", 400, priority=high)) == ["b"]


def test_low_priority_is_not_for_ever():
    old = request("old", 20, priority="low")
    late = 2 * EarliestDue().patience * TYPICAL_MS / 1000
    assert chosen(old, request("new", 20, submitted_at=late), now=late) == ["old"]


def test_a_deadline_that_can_be_met_is_met():
    long = request("long", 400, deadline_at=10.0)  # takes 4 s: it must start by 6
    short = request("short", 50, submitted_at=5.7)  # due 0.3 s after it came
    assert chosen(long, short, now=5.7) == ["long"]
    assert chosen(long, short, now=6.5) == ["short"]  # too late to help


def test_small_requests_share_a_step():
    small = [request(k, 10, cost=ALL_FIXED) for k in "abcd"]
    assert chosen(*small, cost=ALL_FIXED) == ["a", "b", "c", "d"]


def test_large_requests_do_not_share_what_gains_nothing():
    assert chosen(request("a", 400), request("b", 400)) == ["a"]


def test_a_large_request_does_not_slow_a_small_one_down():
    cost = StepCost(fixed_ms=10.0, token_ms=1.0)
    assert chosen(request("s", 10, cost=cost), request("l", 1000, cost=cost), cost=cost) == ["s"]


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [([100, 100, 100], "ab"), ([900, 1, 1], "bc"), ([100, 900, 150], "ac"), ([50] * 5, "abcde")],
)
def test_the_token_budget_holds(tokens, keys):
    policy = EarliestDue(max_stretch=1e9, horizon=1e9)
    requests = [request(k, n, cost=ALL_FIXED) for k, n in zip("abcde", tokens, strict=False)]
    assert chosen(*requests, cost=ALL_FIXED, max_tokens=250, policy=policy) == list(keys)


def test_a_request_beyond_every_budget_steps_alone():
    memory = MemoryCost(token_bytes=1, limit_bytes=10)
    huge = request("huge", 900, cost=ALL_FIXED)
    assert chosen(huge, cost=ALL_FIXED, max_tokens=250, memory=memory) == ["huge"]


def test_the_memory_budget_counts_what_is_held():
    memory = MemoryCost(token_bytes=1, limit_bytes=300)
    small = [request(k, 100, cost=ALL_FIXED) for k in "abc"]
    assert len(chosen(*small, cost=ALL_FIXED, memory=memory)) == 3
    assert len(chosen(*small, cost=ALL_FIXED, memory=memory, held=50)) == 2
