"""FSDP2 over two real processes on gloo: the curve of one process, at any number of processes."""

from contextlib import suppress
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

pytestmark = pytest.mark.slow
STEPS, HALF = 8, 4


class Stopped(Exception):
    """The run ends here, as if it had been killed."""


def train(world: World, folder: Path, until: int = STEPS) -> dict[str, torch.Tensor]:
    """Run the stage from wherever it is up to ``until``; the averaged weights, whole."""
    stage = make_stage(world, steps=STEPS)
    averages: dict[str, torch.Tensor] = {}

    def observe(done, ema, metrics):
        if done == until:
            averages.update(ema.whole_weights())
        if done > until:
            raise Stopped

    with suppress(Stopped):
        train_stage(stage, folder / "run", world, save_every_s=-1.0, observe=observe)
    return averages


def two_processes(world: World, folder: Path, until: int = STEPS) -> None:
    averages = train(world, folder, until)
    torch.save(averages, folder / f"averages-{world.rank}.pt")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, and its averaged weights."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(World(), folder)


def assert_same_run(folder: Path, alone) -> None:
    expected, averages = alone
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-4)
    assert checkpoint.newest(folder / "run").name == f"step-{STEPS:08d}"
    found = checkpoint.load_average(folder / "run")[1]
    for name, value in averages.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4)


def test_two_shards_follow_one_process(tmp_path, alone):
    run_two(two_processes, tmp_path)
    assert_same_run(tmp_path, alone)
    first, second = (torch.load(tmp_path / f"averages-{rank}.pt") for rank in range(2))
    saved = checkpoint.load_average(tmp_path / "run")[1]
    for name, value in saved.items():
        assert torch.equal(first[name], value)
        assert torch.equal(second[name], value)


def test_a_run_of_two_goes_on_with_one(tmp_path, alone):
    run_two(partial(two_processes, until=HALF), tmp_path)
    assert checkpoint.newest(tmp_path / "run").name == f"step-{HALF:08d}"
    train(World(), tmp_path)
    assert_same_run(tmp_path, alone)


def test_a_run_of_one_goes_on_with_two(tmp_path, alone):
    train(World(), tmp_path, until=HALF)
    assert checkpoint.newest(tmp_path / "run").name == f"step-{HALF:08d}"
    run_two(two_processes, tmp_path)
    assert_same_run(tmp_path, alone)
