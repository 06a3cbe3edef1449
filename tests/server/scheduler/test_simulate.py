"""The simulator itself, and what the policy must hold on seeded traces."""

from functools import cache

import pytest

from server.scheduler.budget import StepCost
from server.scheduler.policy import EarliestDue
from server.scheduler.simulate import (
    DEMO_CPU,
    DEMO_MIX,
    H200,
    Device,
    Outcome,
    Replay,
    RoundRobin,
    RunToCompletion,
    Summary,
    TraceJob,
    make_trace,
    percentile,
)


def coarse(slower):
    """The H200 and a recipe of fewer steps, each as much longer: the same traffic, less effort.

    Whoever comes then waits longer for the step under way, so this is the harder case.
    """
    cost = H200.cost
    slow = StepCost(0.0, slower * cost.root_ms, slower * cost.token_ms, slower * cost.pair_ms)
    device = Device(slow, H200.decode_ms_per_pixel)
    return device, {"num_steps": round(50 / slower), "guided_steps": round(12.5 / slower)}


COARSE, FEW_STEPS = coarse(5)


def lindley(trace, device):
    """Finishing times of first come, first served, by its recursion."""
    free, ends = 0.0, []
    for job in trace:
        free = max(free, job.arrives_s) + device.solo_s(job)
        ends.append(free)
    return ends


def test_a_trace_is_its_seed():
    trace = make_trace(seed=3, num_jobs=50, load=0.8)
    assert trace == make_trace(seed=3, num_jobs=50, load=0.8)
    assert trace != make_trace(seed=4, num_jobs=50, load=0.8)


def test_a_trace_carries_its_load():
    trace = make_trace(seed=1, num_jobs=5000, load=0.8)
    work_s = sum(H200.solo_s(job) for job in trace)
    assert work_s / trace[-1].arrives_s == pytest.approx(0.8, rel=0.05)


def test_first_come_first_served_is_its_closed_form():
    trace = make_trace(seed=5, num_jobs=200, load=0.9, device=COARSE, **FEW_STEPS)
    replay = Replay(trace, RunToCompletion(), COARSE, max_running=10**6, max_cost_ms=1e12)
    ends = [outcome.finished_s for outcome in replay.run()]
    assert ends == pytest.approx(lindley(trace, COARSE))


def test_a_job_alone_takes_its_time():
    trace = [TraceJob("a", 1.0, 512), TraceJob("b", 100.0, 1024)]
    for outcome in Replay(trace, EarliestDue()).run():
        assert outcome.stretch == pytest.approx(1.0)


@pytest.mark.parametrize("policy", [EarliestDue, RoundRobin])
def test_sharing_never_costs_time(policy):
    trace = make_trace(seed=5, num_jobs=200, load=0.9, device=COARSE, **FEW_STEPS)
    replay = Replay(trace, policy(), COARSE)
    outcomes = replay.run()
    work_s = sum(COARSE.solo_s(job) for job in trace)
    assert 0.9 * work_s < replay.busy_s <= work_s * (1 + 1e-9)
    assert len(outcomes) == len(trace)


def test_the_same_replay_gives_the_same_times():
    trace = make_trace(seed=5, num_jobs=100, load=0.9, device=COARSE, **FEW_STEPS)
    first, second = (
        [o.finished_s for o in Replay(trace, EarliestDue(), COARSE).run()] for _ in "ab"
    )
    assert first == second


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles_are_values_that_occurred(share, value):
    assert percentile(list(range(100, 0, -1)), share) == value


@cache
def replayed(load, device=COARSE, mix=None, slower=5, seeds=(1, 2, 3, 4), num_jobs=1200):
    """Outcomes of first come, first served and of the policy, all seeds together."""
    device = device if mix else coarse(slower)[0]
    fifo, ours = [], []
    for seed in seeds:
        trace = make_trace(
            seed=seed,
            num_jobs=num_jobs,
            load=load,
            device=device,
            mix=dict(mix) if mix else None,
            **coarse(slower)[1],
        )
        ends = zip(trace, lindley(trace, device), strict=True)
        fifo += [Outcome(job, end, device.solo_s(job)) for job, end in ends]
        ours += Replay(trace, EarliestDue(), device).run()
    return fifo, ours


def small(size):
    return size <= 512


def largest(size):
    return size == 1536


def test_at_load_08_the_typical_caller_waits_half_as_long_and_the_worst_hardly_longer():
    fifo, ours = map(Summary.of, replayed(0.8))
    assert ours.p50_s <= 0.5 * fifo.p50_s
    assert ours.p99_s <= 1.15 * fifo.p99_s


def test_at_load_08_small_pictures_are_hardly_delayed():
    _, ours = replayed(0.8, slower=2, seeds=(1, 2), num_jobs=700)
    assert Summary.of(ours, small).p99_s <= 2.5 * H200.solo_s(TraceJob("", 0.0, 512))


def test_at_load_08_the_largest_wait_for_the_others_but_not_long():
    fifo, ours = (Summary.of(some, largest) for some in replayed(0.8))
    assert ours.p99_s <= 1.5 * fifo.p99_s


@pytest.mark.slow
def test_at_load_095_nobody_starves():
    fifo, ours = (Summary.of(some, largest) for some in replayed(0.95))
    assert ours.p99_s <= 1.5 * fifo.p99_s


def test_the_same_policy_serves_a_slow_device():
    """Times are in typical jobs: the demo checkpoint on a CPU needs no other setting."""
    mix = tuple(DEMO_MIX.items())
    fifo, ours = map(Summary.of, replayed(0.8, DEMO_CPU, mix, seeds=(1,), num_jobs=600))
    assert ours.p50_s <= fifo.p50_s
    assert ours.p99_s <= fifo.p99_s
