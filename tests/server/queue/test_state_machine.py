"""Hypothesis drives the real scripts with injected time and compares with a plain model.

Row "state machine": ready + solo + scheduled + leased + ended = accepted, after every step.
"""

import asyncio
import dataclasses

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis

from server.errors import IdempotencyMismatch, QueueFull, TooManyJobs
from server.protocol import TERMINAL_STATUSES, new_job_id
from server.queue import keys
from server.queue.connection import connect
from server.queue.dead import DeadLetters
from server.queue.jobs import Idempotency, JobQueue
from tests.fakes import FakeClock
from tests.server.queue.helpers import BOOM, POOL, RESULT, spec

# Shrinking runs thousands of scripts and takes many minutes: whoever looks for a bug turns it on.
NO_SHRINKING = (Phase.explicit, Phase.generate)
PRIORITIES = ("low", "normal", "high")
TENANTS = ("a", "b", "c")
WORKERS = ("w1", "w2")


class QueueMachine(RuleBasedStateMachine):
    """Every rule is one call of a caller or a worker; `url` is set by the test."""

    url = ""
    done = None
    claims = Bundle("claims")

    def __init__(self):
        super().__init__()
        self.sync = Redis.from_url(self.url, decode_responses=True)
        self.sync.flushall()
        self.clock = FakeClock()
        self.runner = asyncio.Runner()
        self.queue = self.runner.run(self._open())
        self.accepted, self.ended, self.claim_nos = {}, {}, {}
        self.keyed = {}

    async def _open(self):
        return JobQueue(
            connect(self.url), clock_ms=self.clock, queue_limit=12, tenant_limit=8, lease_s=4.0
        )

    def teardown(self):
        if self.done is not None:
            self.done.jobs += len(self.accepted)
        self.runner.run(self.queue.close())
        self.runner.close()
        self.sync.close()

    @rule(
        priority=st.sampled_from(PRIORITIES),
        tenant=st.sampled_from(TENANTS),
        cost=st.integers(1, 500),
        deadline_s=st.sampled_from([None, None, 3600.0, 10.0]),
    )
    def submit(self, priority, tenant, cost, deadline_s):
        job_id = new_job_id()
        full = self.sync.zcard(keys.queued(POOL)) >= 12
        many = self.sync.zcard(keys.open_jobs(tenant)) >= 8
        options = {"priority": priority, "tenant": tenant, "deadline_s": deadline_s}
        try:
            self.runner.run(self.queue.submit(job_id, spec(), cost_ms=cost, **options))
        except (QueueFull, TooManyJobs):
            assert full or many
        else:
            assert not full
            assert not many
            self.accepted[job_id] = tenant

    @rule(
        target=claims, worker=st.sampled_from(WORKERS), room=st.integers(1, 3), idle=st.booleans()
    )
    def claim(self, worker, room, idle):
        taken = self.runner.run(self.queue.claim(worker, POOL, room, 700, idle=idle))
        assert len(taken) <= room
        assert sum(claim.cost_ms for claim in taken) <= 700
        if any(claim.solo for claim in taken):
            assert idle
            assert len(taken) == 1
        for claim in taken:  # the fence only grows
            assert claim.claim_no > self.claim_nos.get(claim.job_id, 0)
            self.claim_nos[claim.job_id] = claim.claim_no
        return taken

    def _current(self, claim):
        status, number, worker = self.sync.hmget(
            keys.job(claim.job_id), "status", "claim_no", "worker"
        )
        return status == "running" and (int(number), worker) == (claim.claim_no, claim.worker)

    @rule(taken=claims)
    def complete(self, taken):
        for claim in taken:
            before = self.sync.hget(keys.job(claim.job_id), "status")
            current = self._current(claim)
            stood = self.runner.run(self.queue.complete(claim, RESULT))
            assert stood == (current or (before == "succeeded" and self._mine(claim)))

    def _mine(self, claim):
        number, worker = self.sync.hmget(keys.job(claim.job_id), "claim_no", "worker")
        return (int(number), worker) == (claim.claim_no, claim.worker)

    def _stands(self, claim):
        """Whether a failure or release now, or one that was said before, stands."""
        job = keys.job(claim.job_id)
        said, status = self.sync.hmget(job, "ended_claim", "status")
        canceled = status in ("canceled", "expired", "succeeded")
        return self._current(claim) or (said == str(claim.claim_no) and not canceled)

    @rule(taken=claims, retry=st.booleans())
    def fail(self, taken, retry):
        for claim in taken[:1]:
            stands = self._stands(claim)
            assert self.runner.run(self.queue.fail(claim, BOOM, retry)) == stands

    @rule(taken=claims)
    def release(self, taken):
        for claim in taken[-1:]:
            current, stands = self._current(claim), self._stands(claim)
            attempts = int(self.sync.hget(keys.job(claim.job_id), "attempts"))
            assert self.runner.run(self.queue.release(claim)) == stands
            assert int(self.sync.hget(keys.job(claim.job_id), "attempts")) == attempts - current

    @rule(taken=claims)
    def progress(self, taken):
        for claim in taken:
            current = self._current(claim)
            state = self.runner.run(self.queue.progress(claim, 1, 4))
            assert (state == "held") <= current

    @rule(taken=claims, draining=st.booleans())
    def heartbeat(self, taken, draining):
        for claim in taken[:1]:
            held = [c for c in taken if c.worker == claim.worker]
            current = [self._current(c) for c in held]
            gone = self.runner.run(
                self.queue.heartbeat(claim.worker, POOL, held, draining=draining)
            )
            assert [c not in [g for g, _ in gone] for c in held] == current

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def cancel(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.accepted)))
        record = self.runner.run(self.queue.cancel(job_id))
        assert record.status in TERMINAL_STATUSES

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5, 5.0, 20.0]))
    def time_passes(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def reap(self):
        self.runner.run(self.queue.reap())

    @rule()
    def retry_dead(self):
        dead = DeadLetters(self.queue)
        for job_id in self.runner.run(dead.ids(1)):
            new = self.runner.run(dead.retry(job_id))
            self.accepted[new] = self.accepted[job_id]

    @rule()
    def reconcile(self):
        assert self.runner.run(self.queue.reconcile()) == 0

    @rule()
    def scripts_are_forgotten(self):
        self.sync.script_flush()

    @rule(taken=claims)
    def preview(self, taken):
        for claim in taken:
            current = self._current(claim)
            state = self.runner.run(self.queue.put_preview(claim, b"picture"))
            assert (state == "held") == current

    @rule(tenant=st.sampled_from(TENANTS), key=st.sampled_from("xy"), body=st.sampled_from("pq"))
    def submit_with_a_key(self, tenant, key, body):
        job_id, known = new_job_id(), self.keyed.get((tenant, key))
        options = {"tenant": tenant, "cost_ms": 9, "idempotency": Idempotency(key, body)}
        try:
            record = self.runner.run(self.queue.submit(job_id, spec(), **options))
        except IdempotencyMismatch:
            assert known is not None
            assert known[1] != body
        except (QueueFull, TooManyJobs):
            assert known is None
        else:
            assert (record.id, body) == (known or (job_id, body))
            self.keyed[tenant, key] = record.id, body
            self.accepted.setdefault(record.id, tenant)

    @invariant()
    def every_job_is_in_exactly_one_place(self):
        if self.done is not None:
            self.done.steps += 1
        places = {"leased": set(self.sync.zrange(keys.LEASE, 0, -1))}
        places["scheduled"] = set(self.sync.zrange(keys.SCHEDULED, 0, -1))
        places["solo"] = set(self.sync.zrange(keys.solo(POOL), 0, -1))
        ready, rings = set(), set()
        for priority in PRIORITIES:
            for tenant in TENANTS:
                found = self.sync.zrange(keys.ready(POOL, priority, tenant), 0, -1)
                ready |= set(found)
                rings |= {(priority, tenant)} if found else set()
        places["ready"] = ready
        statuses, work = {}, 0
        for job_id in self.accepted:
            status, cost = self.sync.hmget(keys.job(job_id), "status", "cost")
            statuses[job_id] = status
            work += int(cost) if status == "queued" else 0
            where = [name for name, ids in places.items() if job_id in ids]
            expected = {"queued": 1, "running": 1}.get(status, 0)
            assert len(where) == expected, (job_id, status, where)
            assert (status == "running") == (where == ["leased"])
            if job_id in self.ended:
                assert status == self.ended[job_id]  # one terminal status, ever
            if status in TERMINAL_STATUSES:
                self.ended[job_id] = status
                assert self.sync.ttl(keys.job(job_id)) > 0
                assert self.sync.ttl(keys.events(job_id)) > 0
        assert set().union(*places.values()) <= set(self.accepted)
        self._counters_agree(statuses, work, rings)

    def _counters_agree(self, statuses, work, rings):
        queued = {job_id for job_id, status in statuses.items() if status == "queued"}
        assert set(self.sync.zrange(keys.queued(POOL), 0, -1)) == queued
        assert sum(map(int, self.sync.hvals(keys.work(POOL)))) == work
        for tenant in TENANTS:
            alive = {
                job_id
                for job_id, owner in self.accepted.items()
                if owner == tenant and statuses[job_id] not in TERMINAL_STATUSES
            }
            assert set(self.sync.zrange(keys.open_jobs(tenant), 0, -1)) == alive
        ring = f"{keys.PREFIX}ring:{POOL}"
        found = {(p, t) for p in PRIORITIES for t in self.sync.zrange(f"{ring}:{p}", 0, -1)}
        assert found == rings
        assert set(self.sync.zrange(ring, 0, -1)) == {priority for priority, _ in rings}


@dataclasses.dataclass
class Done:
    """What a run came to: steps taken, jobs accepted."""

    steps: int = 0
    jobs: int = 0


def run_machine(url, examples, steps, seed=0):
    """Run up to `examples` stories of up to `steps` steps; the same seed tells the same ones."""
    done = Done()
    machine = type("Machine", (QueueMachine,), {"url": url, "done": done})
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        hypothesis.seed(seed)(machine),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            suppress_health_check=quiet, phases=NO_SHRINKING,
        ),
    )  # fmt: skip
    return done


@pytest.mark.slow
def test_hypothesis_state_machine_on_the_real_scripts(redis_url):
    assert run_machine(redis_url, examples=12, steps=40).jobs > 0


@pytest.mark.very_slow
@pytest.mark.timeout(1800)
def test_hypothesis_state_machine_ten_thousand_steps(redis_url):
    seed, steps = 1, 0
    while steps < 10_000:
        steps += run_machine(redis_url, examples=60, steps=100, seed=seed).steps
        seed += 1


def test_the_machine_can_fail(redis_url):
    class Careless(JobQueue):
        async def complete(self, claim, result):
            return await super().complete(dataclasses.replace(claim, claim_no=0), result)

    class Broken(QueueMachine):
        url = redis_url

        async def _open(self):
            return Careless(connect(self.url), clock_ms=self.clock)

    machine = Broken()
    try:
        machine.submit(priority="low", tenant="a", cost=1, deadline_s=None)
        taken = machine.claim(worker="w1", room=1, idle=True)
        with pytest.raises(AssertionError):
            machine.complete(taken=list(taken))
    finally:
        machine.teardown()
