"""A training stage of a few hundred weights whose loss depends on the step and the rank alone."""

import torch
import torch.nn.functional as F
from torch import nn

from trainer.config import OptimizerConfig
from trainer.distributed import World
from trainer.stages.base import WholeStage

BATCH = 8
ALONE = World()
TOTAL_STEPS = 6


class TinyStage(WholeStage):
    """A convolution and a linear layer fitted to noise.

    Args:
        optimizer: "adamw" or "muon".
        world: the batch of a step is split evenly between its processes.
        fail_at: the step whose loss raises `Killed`.
        seed: of the first weights.
    """

    name = "tiny"
    total_steps = TOTAL_STEPS
    images_per_step = BATCH

    def __init__(self, optimizer="muon", world=ALONE, fail_at=None, seed=0) -> None:
        self.optimizer = OptimizerConfig(
            name=optimizer, lr=0.02, matrix_lr=0.02, warmup=2, cooldown=0.5, clip=0.5, ema_decay=0.8
        )
        self._world, self._fail_at = world, fail_at
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2))
        self.steps_seen: list[int] = []

    def loss(self, step: int):
        if step == self._fail_at:
            raise KilledError
        self.steps_seen.append(step)
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 4, 4, generator=generator)
        targets = torch.randn(BATCH, 2, generator=generator)
        share = slice(self._world.rank, None, self._world.size)
        loss = F.mse_loss(self.module(images[share]), targets[share])
        return loss, {"twice": 2 * loss.item()}


class KilledError(Exception):
    """The process ended here."""
