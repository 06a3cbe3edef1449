"""Two real processes that talk through gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainer.tiny_stage import TOTAL_STEPS, TinyStage
from trainer import checkpoint
from trainer.distributed import (
    World,
    average_gradients,
    average_scalar,
    barrier,
    broadcast_parameters,
    close_world,
    init_world,
)
from trainer.trainer import train_stage

TWO = 2


def run_two(work: Callable[[World, Path], None], folder: Path) -> None:
    """Run ``work(world, folder)`` in two processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=_enter, args=(work, folder, rank, port), daemon=True)
        for rank in range(TWO)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=280)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _enter(work, folder: Path, rank: int, port: int) -> None:
    os.environ.update(
        WORLD_SIZE=str(TWO), RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = init_world()
    try:
        work(world, folder)
    finally:
        close_world()


def exchange(world: World, folder: Path) -> None:
    """Every function of the module, with values that depend on the rank."""
    torch.manual_seed(world.rank)
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    broadcast_parameters(world, weights)
    for i, weight in enumerate(weights):
        weight.grad = torch.full(weight.shape, float(10 * i + world.rank))
    unused = torch.nn.Parameter(torch.zeros(1))
    average_gradients(world, [*weights, unused])
    assert unused.grad is None
    barrier(world)
    torch.save(
        {
            "world": (world.rank, world.size, world.is_main),
            "threads": torch.get_num_threads(),
            "weights": [weight.detach() for weight in weights],
            "grads": [weight.grad for weight in weights],
            "scalar": average_scalar(world, 1.0 + world.rank),
        },
        folder / f"{world.rank}.pt",
    )


def train_tiny(world: World, folder: Path) -> None:
    """A stage whose ranks begin with different weights and share every batch."""
    stage = TinyStage(world=world, seed=world.rank)
    ema = train_stage(stage, folder / "run", world, save_every_s=-1.0)
    torch.save((stage.module.state_dict(), ema.weights()), folder / f"{world.rank}.pt")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_values_are_averaged_and_shared(tmp_path):
    run_two(exchange, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(TWO))
    assert (first["world"], second["world"]) == ((0, 2, True), (1, 2, False))
    assert first["scalar"] == second["scalar"] == 1.5
    assert first["threads"] == max(1, (os.cpu_count() or 1) // TWO)
    torch.manual_seed(0)
    expected = [torch.randn(3, 2), torch.randn(4)]
    for found in (first, second):
        assert all(map(torch.equal, found["weights"], expected))
        assert torch.equal(found["grads"][0], torch.full((3, 2), 0.5))
        assert torch.equal(found["grads"][1], torch.full((4,), 10.5))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_like_one(tmp_path):
    run_two(train_tiny, tmp_path)
    (module, ema), other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(TWO))
    alone = TinyStage()
    average = train_stage(alone, tmp_path / "alone", World())
    for key, value in alone.module.state_dict().items():
        assert torch.equal(module[key], other[0][key])
        assert torch.equal(ema[key], other[1][key])
        torch.testing.assert_close(module[key], value, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ema[key], average.weights()[key], atol=1e-4, rtol=1e-4)
    assert checkpoint.newest(tmp_path / "run").name == f"step-{TOTAL_STEPS:08d}"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == TOTAL_STEPS


def test_one_process_talks_to_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = init_world()
    assert world == World(rank=0, size=1)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 3.0)
    average_gradients(world, [weight])
    broadcast_parameters(world, [weight])
    barrier(world)
    close_world()
    assert weight.grad.tolist() == [3.0, 3.0]
    assert average_scalar(world, 0.1) == 0.1
    assert not torch.distributed.is_initialized()
