"""The training loop, the same for every stage.

A stage says what to train and what its loss is at a step; the loop does the rest: resume, backward,
averaging over processes, clipping, optimiser, EMA, metrics, checkpoints. A stage draws everything
random from its step number, so that a resumed run sees exactly what an uninterrupted one sees.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.config import OptimizerConfig
from trainer.distributed import (
    World,
    average_gradients,
    average_scalar,
    barrier,
    broadcast_parameters,
)
from trainer.ema import Ema
from trainer.metrics import Metrics
from trainer.optim import build_optimizers, lr_factor, set_lr

LOG_EVERY = 20


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str
    total_steps: int
    images_per_step: int
    optimizer: OptimizerConfig

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Loss of a step and what to report of it."""
        ...


def train_stage(stage: Stage, folder: Path, world: World, *, save_every_s: float = 120.0) -> Ema:
    """Train to the stage's last step, from the newest checkpoint in ``folder`` if there is one."""
    config = stage.optimizer
    broadcast_parameters(world, stage.module.parameters())
    optimizers = build_optimizers(
        stage.module, config.name, config.lr, config.matrix_lr, config.betas, world
    )
    ema = Ema(stage.module, config.ema_decay)
    first = _resume(stage, folder, optimizers, ema)
    parameters = [p for p in stage.module.parameters() if p.requires_grad]
    saved_at = time.monotonic()
    with Metrics(folder, stage.name, stage.total_steps, first, enabled=world.is_main) as metrics:
        for step in range(first, stage.total_steps):
            set_lr(optimizers, lr_factor(step, stage.total_steps, config.warmup, config.cooldown))
            loss, report = stage.loss(step)
            loss.backward()
            average_gradients(world, parameters)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            ema.update()
            done = step + 1
            if done % LOG_EVERY == 0 or done == stage.total_steps:
                values = {"loss": average_scalar(world, loss.item()), "grad_norm": float(norm)}
                metrics.log(done, {**values, **report}, stage.images_per_step)
            if world.is_main and (
                done == stage.total_steps or time.monotonic() - saved_at > save_every_s
            ):
                saved_at = time.monotonic()
                _save(stage, folder, done, optimizers, ema)
    barrier(world)
    return ema


def _save(
    stage: Stage, folder: Path, step: int, optimizers: list[torch.optim.Optimizer], ema: Ema
) -> None:
    state = {
        "step": step,
        "module": stage.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "ema": ema.state_dict(),
    }
    checkpoint.save_state(folder, state)


def _resume(stage: Stage, folder: Path, optimizers: list[torch.optim.Optimizer], ema: Ema) -> int:
    """Restore the newest checkpoint; the number of steps it has done, 0 without one."""
    state = checkpoint.load_state(folder)
    if state is None:
        return 0
    stage.module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    ema.load_state_dict(state["ema"])
    return int(state["step"])
