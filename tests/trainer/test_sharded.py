"""FSDP2 over two real processes on gloo: the curve of one process, at any number of processes."""

from functools import partial
from pathlib import Path

import pytest
import torch

from tests.trainer.flow_world import make_stage
from tests.trainer.test_distributed import run_two
from trainer import checkpoint
from trainer.distributed import World
from trainer.metrics import read_metrics
from trainer.trainer import train_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 9


def train(world: World, folder: Path, until: int = STEPS) -> dict[str, torch.Tensor]:
    """Train from wherever the run is up to ``until``; the averaged weights, whole."""
    stage = make_stage(world, steps=until)  # the rate is constant: an end changes nothing before it
    return train_stage(stage, folder / "run", world).whole_weights()


def two_processes(world: World, folder: Path, until: int = STEPS) -> None:
    torch.save(train(world, folder, until), folder / f"averages-{world.rank}.pt")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, and its averaged weights."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(World(), folder)


def assert_same_run(folder: Path, alone) -> None:
    expected, averages = alone
    assert len(losses(folder)) == STEPS
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-4)
    assert checkpoint.newest(folder / "run").name == f"step-{STEPS:08d}"
    found = checkpoint.load_average(folder / "run")[1]
    for name, value in averages.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


def test_two_shards_follow_one_process(tmp_path, alone):
    run_two(two_processes, tmp_path)
    assert_same_run(tmp_path, alone)
    first, second = (torch.load(tmp_path / f"averages-{rank}.pt") for rank in range(2))
    for name, value in checkpoint.load_average(tmp_path / "run")[1].items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)
    shards = list((tmp_path / "run" / "checkpoints").glob("*/*.distcp"))
    assert len(shards) == 2, "each process writes its own"


@pytest.mark.very_slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    train(World(), tmp_path, until=3)
    run_two(partial(two_processes, until=6), tmp_path)
    train(World(), tmp_path)
    assert_same_run(tmp_path, alone)
