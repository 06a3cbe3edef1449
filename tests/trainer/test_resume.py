import pytest
import torch

import trainer.trainer
from tests.trainer.tiny_stage import TOTAL_STEPS, KilledError, TinyStage
from trainer import checkpoint
from trainer.distributed import World
from trainer.metrics import read_metrics
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


def state_of(folder):
    """Everything that a stage's newest checkpoint holds, or None."""
    path = checkpoint.newest(folder)
    if path is None:
        return None
    parts = {part: checkpoint.load_whole(path, part) for part in ("module", "ema", "optimizer")}
    return {**checkpoint.read_progress(path), **parts}


def train(folder, save_every_s=EVERY_STEP, **options) -> TinyStage:
    stage = TinyStage(**options)
    train_stage(stage, folder, World(), save_every_s=save_every_s)
    return stage


@pytest.fixture(scope="module", params=["adamw", "muon"])
def uninterrupted(request, tmp_path_factory):
    """The optimizer's name and the state after a run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, optimizer=request.param)
    return request.param, state_of(folder)


def test_training_moves_everything(uninterrupted):
    name, state = uninterrupted
    start = TinyStage(optimizer=name).module.state_dict()
    assert state["step"] == TOTAL_STEPS
    for key, value in start.items():
        assert not torch.equal(state["module"][key], value)
        assert not torch.equal(state["ema"][key], state["module"][key])


@pytest.mark.parametrize("killed_at", range(TOTAL_STEPS))
def test_killed_at_any_step_it_ends_bit_equal(uninterrupted, tmp_path, killed_at):
    name, whole = uninterrupted
    with pytest.raises(KilledError):
        train(tmp_path, optimizer=name, fail_at=killed_at)
    # Other first weights: whatever was not restored would show.
    resumed = train(tmp_path, optimizer=name, seed=1 if killed_at else 0)
    assert resumed.steps_seen == list(range(killed_at, TOTAL_STEPS))
    assert_same(state_of(tmp_path), whole)


def test_killed_twice_and_between_saves(uninterrupted, tmp_path):
    name, whole = uninterrupted
    for save_every_s, killed_at in ((EVERY_STEP, 2), (1e9, 4)):
        with pytest.raises(KilledError):
            train(tmp_path, save_every_s, optimizer=name, fail_at=killed_at)
        assert state_of(tmp_path)["step"] == 2
    resumed = train(tmp_path, optimizer=name, seed=1)
    assert resumed.steps_seen == [2, 3, 4, 5]
    assert_same(state_of(tmp_path), whole)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    train(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/*/*")}
    stage = TinyStage(fail_at=0, seed=1)
    ema = train_stage(stage, tmp_path, World())
    assert stage.steps_seen == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoints/*/*")} == before
    state = state_of(tmp_path)
    assert_same(ema.weights(), state["ema"])
    assert_same(dict(stage.module.state_dict()), dict(state["module"]))


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"module.weight": torch.full((3,), value)}


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    checkpoint.save(tmp_path, 3, weights(3.0), {}, World())
    half = tmp_path / checkpoint.FOLDER / "step-00000004.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "step-00000003"
    checkpoint.save(tmp_path, 4, weights(4.0), {}, World())
    assert (
        checkpoint.load_whole(checkpoint.newest(tmp_path), "module")["weight"].tolist() == [4.0] * 3
    )
    assert sorted(p.name for p in half.parent.iterdir()) == ["step-00000003", "step-00000004"]


def test_old_checkpoints_are_pruned_and_the_same_step_replaced(tmp_path):
    for step in (1, 2, 3, 3):
        checkpoint.save(tmp_path, step, weights(step), {}, World())
    names = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir())
    assert names == ["step-00000002", "step-00000003"]


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere") is None
    assert checkpoint.load_average(tmp_path / "nowhere") is None


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoint.save(tmp_path, 3, weights(3.0), {}, World())
    (checkpoint.newest(tmp_path) / checkpoint.PROGRESS).write_text("{")
    with pytest.raises(ValueError, match="step-00000003: not a whole checkpoint"):
        checkpoint.load_average(tmp_path)


def test_a_run_of_an_earlier_version_goes_on(uninterrupted, tmp_path):
    """Its state was one file, with the optimisers' own dictionaries."""
    name, whole = uninterrupted
    stage = TinyStage(optimizer=name)
    loop = trainer.trainer._Loop(stage, tmp_path, World())
    for step in range(3):
        loop.step(step, due=False)
    state = {
        "step": 3,
        "module": stage.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in loop._optimizers],
        "ema": loop.ema.state_dict(),
    }
    torch.save(state, tmp_path / checkpoint.LEGACY_STATE)
    assert checkpoint.load_average(tmp_path)[0] == 3
    resumed = train(tmp_path, optimizer=name, seed=1)
    assert resumed.steps_seen == [3, 4, 5]
    assert_same(state_of(tmp_path), whole)


def test_metrics_have_every_step_once_however_often_it_was_killed(tmp_path):
    for save_every_s, killed_at in ((1e9, 2), (EVERY_STEP, 3), (1e9, 5)):
        with pytest.raises(KilledError):
            train(tmp_path, save_every_s, fail_at=killed_at)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')  # what a kill leaves
    train(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, TOTAL_STEPS + 1))
    train(tmp_path / "whole")
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert all(row["twice"] == pytest.approx(2 * row["loss"], abs=1e-5) for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert list((tmp_path / "tensorboard").glob("events.*"))


class Broken(TinyStage):
    """Its loss is no number at some steps."""

    def __init__(self, bad, on_nonfinite, **options) -> None:
        super().__init__(**options)
        self._bad, self.on_nonfinite = bad, on_nonfinite

    def loss(self, step: int):
        loss, report = super().loss(step)
        return (loss * float("nan"), report) if step in self._bad else (loss, report)

    def suspects(self):
        return ["images/7.png"]


def test_a_loss_that_is_no_number_stops_and_says_where(tmp_path):
    stage = Broken({3}, "stop")
    with pytest.raises(ValueError, match=r"stage tiny, step 4: loss nan.*images/7\.png.*lower"):
        train_stage(stage, tmp_path, World(), save_every_s=EVERY_STEP)
    state = state_of(tmp_path)
    assert state["step"] == 3
    assert all(bool(value.isfinite().all()) for value in state["module"].values())


def test_a_loss_that_is_no_number_can_be_skipped_and_is_counted(tmp_path, caplog):
    stage = Broken({1, 3}, "skip")
    ema = train_stage(stage, tmp_path, World(), save_every_s=EVERY_STEP)
    assert state_of(tmp_path)["skipped"] == 2
    assert all(bool(value.isfinite().all()) for value in ema.weights().values())
    warned = [r.message.split(":")[0] for r in caplog.records if r.name == "trainer.trainer"]
    assert warned == ["stage tiny, step 2", "stage tiny, step 4"]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("skipped") for row in rows] == [None, 1, 1, 2, 2, 2]


def test_skipping_for_ever_stops(tmp_path):
    stage = Broken(range(100), "skip")
    stage.total_steps = 100
    with pytest.raises(ValueError, match="21 steps one after another"):
        train_stage(stage, tmp_path, World())
