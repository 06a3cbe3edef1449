"""Memory runs out in a step, in decoding, in preparation: the batch shrinks, the worker lives."""

import weakref

import pytest
import torch

from server.scheduler.budget import StepBudget, StepCost
from server.scheduler.policy import EarliestDue
from server.scheduler.scheduler import Scheduler
from server.worker.engine import TILED, Engine
from server.worker.memory import MARGIN, USABLE, PeakMemory, Sample, fit_memory, is_out_of_memory
from tests.fakes import FakePipeline
from tests.server.worker.test_engine import claim, start


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"), True),
        (RuntimeError("a bug"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, answer):
    assert is_out_of_memory(error) is answer


def test_the_cpu_allocators_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)


def test_a_batch_too_large_for_memory_is_halved_until_it_fits():
    pipeline, told = FakePipeline(num_steps=1, memory=2), []
    engine = Engine(pipeline, on_out_of_memory=told.append)
    batch = start(engine, "a", "b", "c", "d", "e")  # a token each
    assert engine.step(batch) == []
    assert pipeline.batches == [list("abcde"), list("abc"), list("ab"), ["c"], list("de")]
    assert [left.steps for left in engine.remaining(batch).values()] == [0] * 5
    assert told == [5, 3]
    assert engine.num_out_of_memory == 2


def test_the_culprit_is_tried_again_alone_and_fails_cleanly():
    pipeline = FakePipeline(num_steps=2)
    engine = Engine(pipeline)
    batch = start(engine, "a", "huge", "b")
    (failure,) = engine.step(batch)
    assert failure.claim.spec.prompt == "huge"
    assert (failure.error.code, failure.retry) == ("out-of-memory", False)
    assert [b for b in pipeline.batches if b == ["huge"]] == [["huge"]] * 2
    assert [left.steps for left in engine.remaining(batch).values()] == [1, 1]
    assert engine.step(start(engine, "c")) == []


def test_a_decoding_too_large_for_memory_is_split_then_tiled():
    engine = Engine(FakePipeline(num_steps=1, memory=4))
    small = [engine.prepare(claim(p, p, width=16, height=32), 0.0).key for p in "abc"]
    large = engine.prepare(claim("large", "large", width=64, height=32), 0.0).key
    states = {key: engine._jobs[key].state for key in [*small, large]}
    decoded, failures = engine.decode([*small, large])
    assert failures == []
    assert [d.job.claim.spec.prompt for d in decoded] == ["a", "b", "c", "large"]
    assert states[large].warnings == [TILED]
    assert all(states[key].warnings == [] for key in small)


def test_after_it_the_scheduler_fills_steps_less():
    policy = EarliestDue(max_stretch=1e9, horizon=1e9)
    scheduler = Scheduler(
        max_running=8,
        max_step_tokens=1000,
        budget=StepBudget(1000, StepCost(fixed_ms=100.0, token_ms=0.01)),
        policy=policy,
    )
    engine = Engine(FakePipeline(num_steps=9, memory=2), lambda: None, scheduler.out_of_memory)
    for i in range(4):
        scheduler.add(engine.prepare(claim("p", f"job{i}"), 0.0))
    sizes = []
    for _ in range(2):
        batch = scheduler.schedule()
        assert engine.step(batch) == []
        scheduler.complete_step(batch, engine.remaining(batch))
        sizes.append(len(batch.keys))
    assert sizes == [4, 2]


def test_the_fitted_model_is_never_below_a_measured_step():
    samples = [Sample(100, 1500), Sample(400, 4400), Sample(200, 2700)]
    cost = fit_memory(samples, decode_bytes=50, free_bytes=10_000)
    assert cost.token_bytes == pytest.approx(MARGIN * 2900 / 300)
    assert cost.limit_bytes == USABLE * 10_000
    for sample in samples:
        assert cost.fixed_bytes + cost.token_bytes * sample.tokens >= MARGIN * sample.peak_bytes - 1


def test_the_peak_of_host_memory_is_seen():
    peak = PeakMemory()
    needed = peak.of(lambda: torch.ones(32 * 2**20, dtype=torch.uint8))
    assert 30 * 2**20 < needed < 80 * 2**20
    assert peak.of(lambda: None) < 8 * 2**20
    assert peak.free_bytes() > 0


class Tensor:
    """Stands for the activations of a forward."""


class Holding(FakePipeline):
    """Keeps activations in the frame that runs out of memory; notes what is alive at each call."""

    def __init__(self, **options):
        super().__init__(**options)
        self.made, self.alive = weakref.WeakSet(), []

    def _allocate(self, tokens, states):
        self.alive.append(len(self.made))
        activations = Tensor()
        self.made.add(activations)
        super()._allocate(tokens, states)


def test_what_a_failed_attempt_computed_is_freed_before_the_next():
    pipeline = Holding(num_steps=1, memory=2)
    engine = Engine(pipeline)
    batch = start(engine, "a", "b", "c", "d", "e")
    assert engine.step(batch) == []
    large = engine.prepare(claim("large", "large", width=64, height=32), 0.0).key
    _, failures = engine.decode([large])
    assert failures == []
    assert len(engine.step(start(engine, "huge"))) == 1
    assert pipeline.alive == [0] * len(pipeline.alive)
    assert len(pipeline.alive) == 5 + 2 + 2


def test_a_preparation_that_runs_out_of_memory_is_tried_once_more():
    class Tight(FakePipeline):
        left = 1  # attempts that fail

        def prepare(self, request):
            self.left -= 1
            if self.left >= 0:
                raise MemoryError("the text encoder")
            return super().prepare(request)

    pipeline = Tight()
    engine = Engine(pipeline)
    assert engine.step(start(engine, "a")) == []
    assert engine.num_out_of_memory == 1
    pipeline.left = 2
    failure = engine.prepare(claim("b", "b"), 0.0)
    assert (failure.error.code, failure.retry) == ("out-of-memory", False)
