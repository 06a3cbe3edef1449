import json

import pytest
import torch

from tests.trainer.tiny_stage import TOTAL_STEPS, KilledError, TinyStage
from trainer import checkpoint
from trainer.distributed import World
from trainer.trainer import train_stage

EVERY_STEP = -1.0


def assert_same(ours, theirs) -> None:
    """Bit-equal trees of dicts, lists and tensors."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def train(folder, save_every_s=EVERY_STEP, **options) -> TinyStage:
    stage = TinyStage(**options)
    train_stage(stage, folder, World(), save_every_s=save_every_s)
    return stage


@pytest.fixture(scope="module", params=["adamw", "muon"])
def uninterrupted(request, tmp_path_factory):
    """The optimizer's name and the state after a run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, optimizer=request.param)
    return request.param, checkpoint.load_state(folder)


def test_training_moves_everything(uninterrupted):
    name, state = uninterrupted
    start = TinyStage(optimizer=name).module.state_dict()
    assert state["step"] == TOTAL_STEPS
    for key, value in start.items():
        assert not torch.equal(state["module"][key], value)
        assert not torch.equal(state["ema"]["average"][key], state["module"][key])


@pytest.mark.parametrize("killed_at", range(TOTAL_STEPS))
def test_killed_at_any_step_it_ends_bit_equal(uninterrupted, tmp_path, killed_at):
    name, whole = uninterrupted
    with pytest.raises(KilledError):
        train(tmp_path, optimizer=name, fail_at=killed_at)
    # Other first weights: whatever was not restored would show.
    resumed = train(tmp_path, optimizer=name, seed=1 if killed_at else 0)
    assert resumed.steps_seen == list(range(killed_at, TOTAL_STEPS))
    assert_same(checkpoint.load_state(tmp_path), whole)


def test_killed_twice_and_between_saves(uninterrupted, tmp_path):
    name, whole = uninterrupted
    for save_every_s, killed_at in ((EVERY_STEP, 2), (1e9, 4)):
        with pytest.raises(KilledError):
            train(tmp_path, save_every_s, optimizer=name, fail_at=killed_at)
        assert checkpoint.load_state(tmp_path)["step"] == 2
    resumed = train(tmp_path, optimizer=name, seed=1)
    assert resumed.steps_seen == [2, 3, 4, 5]
    assert_same(checkpoint.load_state(tmp_path), whole)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    train(tmp_path)
    before = (tmp_path / checkpoint.STATE).read_bytes()
    stage = TinyStage(fail_at=0, seed=1)
    ema = train_stage(stage, tmp_path, World())
    assert stage.steps_seen == []
    assert (tmp_path / checkpoint.STATE).read_bytes() == before
    state = checkpoint.load_state(tmp_path)
    assert_same(ema.weights(), state["ema"]["average"])
    assert_same(dict(stage.module.state_dict()), dict(state["module"]))


def test_a_half_written_state_is_not_read(tmp_path):
    checkpoint.save_state(tmp_path, {"step": 3})
    (tmp_path / f"{checkpoint.STATE}.tmp").write_bytes(b"half")
    assert checkpoint.load_state(tmp_path) == {"step": 3}
    checkpoint.save_state(tmp_path, {"step": 4})
    assert checkpoint.load_state(tmp_path) == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.STATE]


def test_without_a_state_there_is_nothing_to_resume(tmp_path):
    assert checkpoint.load_state(tmp_path / "nowhere") is None


def test_only_plain_data_is_read_back(tmp_path):
    """A pickle may run code when it is loaded."""
    checkpoint.save_state(tmp_path, {"stage": TinyStage})
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoint.load_state(tmp_path)


def test_metrics_are_written_and_continued(tmp_path):
    with pytest.raises(KilledError):
        train(tmp_path, fail_at=3)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    train(tmp_path)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == TOTAL_STEPS
    assert row["twice"] == pytest.approx(2 * row["loss"], abs=1e-5)
    assert row["grad_norm"] > 0
    assert list((tmp_path / "tensorboard").glob("events.*"))
