import pytest

from server.protocol import JobSpec
from server.queue.jobs import Claim
from server.scheduler.request import RunningRequest
from server.scheduler.scheduler import StepBatch
from server.worker.engine import Engine, Failure
from tests.fakes import FakePipeline


def claim(prompt="p", job_id="job", **fields):
    spec = JobSpec(prompt=prompt, seed=7, **fields)
    return Claim(
        job_id=job_id, claim_no=1, worker="w", attempts=1, tenant="t", solo=False,
        waited_ms=0, cost_ms=10, spec=spec,
    )  # fmt: skip


@pytest.fixture
def pipeline():
    return FakePipeline(num_steps=2)


@pytest.fixture
def engine(pipeline):
    return Engine(pipeline)


def start(engine, *prompts):
    keys = []
    for i, prompt in enumerate(prompts):
        prepared = engine.prepare(claim(prompt, f"job{i}"), 0.0)
        assert isinstance(prepared, RunningRequest)
        keys.append(prepared.key)
    return StepBatch(tuple(keys))


def test_all_requests_step_in_one_forward(engine, pipeline):
    batch = start(engine, "a", "b", "c")
    assert engine.step(batch) == []
    assert pipeline.batches == [["a", "b", "c"]]
    assert [engine.remaining(batch)[key].steps for key in batch.keys] == [1, 1, 1]
    assert engine.progress(batch.keys[0]) == (1, 2)


def test_a_request_the_model_refuses_fails_for_good(engine):
    failure = engine.prepare(claim("refuse"), 0.0)
    assert isinstance(failure, Failure)
    assert (failure.error.code, failure.retry) == ("invalid-request", False)
    assert "'refuse' is not allowed" in failure.error.detail


def test_a_malformed_size_fails_for_good(engine):
    failure = engine.prepare(claim(width=17), 0.0)
    assert isinstance(failure, Failure)
    assert failure.error.detail.startswith("width 17")


def test_the_culprit_fails_alone(engine, pipeline):
    batch = start(engine, "a", "explode", "b")
    failures = engine.step(batch)
    assert [f.claim.spec.prompt for f in failures] == ["explode"]
    assert (failures[0].error.code, failures[0].retry) == ("internal", True)
    assert "a bug" not in failures[0].error.detail
    survivors = engine.remaining(batch)
    assert [remaining.steps for remaining in survivors.values()] == [1, 1]
    assert pipeline.batches == [["a", "explode", "b"], ["a"], ["explode"], ["b"]]


def test_a_picture_that_cannot_be_decoded_fails_alone(engine):
    batch = start(engine, "a", "blind")
    for _ in range(2):
        engine.step(batch)
    decoded, failures = engine.decode(batch.keys)
    assert [d.job.claim.spec.prompt for d in decoded] == ["a"]
    assert [f.claim.spec.prompt for f in failures] == ["blind"]
    assert engine.claims() == []


def test_steps_are_counted(engine):
    batch = start(engine, "a")
    for _ in range(2):
        engine.step(batch)
    (decoded,), _ = engine.decode(batch.keys)
    assert (decoded.job.steps.computed, decoded.job.steps.skipped) == (2, 0)
    assert decoded.job.steps.nfe == 2


def test_abort_gives_the_claim_back(engine):
    (key,) = start(engine, "a").keys
    assert engine.abort(key).spec.prompt == "a"
    assert engine.abort(key) is None
