"""The training loop, the same for every stage.

A stage says what to train and what its loss is at a step; the loop does the rest: resume, backward,
averaging over processes, clipping, optimiser, EMA, metrics, checkpoints.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.distributed import (
    World,
    average_gradients,
    average_scalars,
    barrier,
    gather_names,
)
from trainer.ema import Ema
from trainer.metrics import Metrics
from trainer.optim import build_optimizers, lr_factor, set_lr
from trainer.stages.base import Stage
from trainer.state import TrainingState

log = logging.getLogger(__name__)

MAX_SKIPPED_RUN = 20  # steps without a number one after another: skipping does not mend it

Observe = Callable[[int, Ema, Metrics], None]


class NonFiniteError(ValueError):
    """A loss or a gradient was no number; the message says where."""


def train_stage(
    stage: Stage,
    folder: Path,
    world: World,
    *,
    save_every_s: float = 120.0,
    observe: Observe | None = None,
) -> Ema:
    """Train to the stage's last step, from the newest checkpoint in ``folder`` if there is one.

    Args:
        stage: what to train.
        folder: of its checkpoints and metrics.
        world: the processes taking part.
        save_every_s: seconds between checkpoints; negative: after every step.
        observe: called by all processes after every step that counted.

    Returns:
        The averaged weights.

    Raises:
        NonFiniteError: when a loss is no number and the stage does not skip such steps.
    """
    stage.spread(world)
    loop = _Loop(stage, folder, world)
    first = loop.restore()
    saved_at = time.monotonic()
    with Metrics(folder, stage.name, stage.total_steps, first, enabled=world.is_main) as metrics:
        for step in range(first, stage.total_steps):
            due = time.monotonic() - saved_at > save_every_s
            values, due = loop.step(step, due)
            done = step + 1
            metrics.log(done, values, stage.images_per_step)
            if observe is not None:
                observe(done, loop.ema, metrics)
            if due or done == stage.total_steps:
                saved_at = time.monotonic()
                loop.save(done)
    barrier(world)
    return loop.ema


class _Loop:
    """One stage with its optimisers and averages."""

    def __init__(self, stage: Stage, folder: Path, world: World) -> None:
        config = stage.optimizer
        self._stage, self._folder, self._world = stage, folder, world
        self._optimizers = build_optimizers(
            stage.module,
            config.name,
            config.lr,
            config.matrix_lr,
            config.betas,
            None if stage.sharded else world,
            config.eps,
        )
        self.ema = Ema(stage.module, config.ema_decay)
        self._state = TrainingState(stage.module, self._optimizers, self.ema)
        self._parameters = [p for p in stage.module.parameters() if p.requires_grad]
        self._skipped = self._skipped_run = 0

    def restore(self) -> int:
        """Steps that the newest checkpoint has done."""
        step, self._skipped = self._state.restore(self._folder, self._world)
        return step

    def save(self, step: int) -> None:
        """Write a checkpoint after ``step`` steps."""
        self._state.save(self._folder, step, self._skipped, self._world)

    def step(self, step: int, due: bool) -> tuple[dict[str, float], bool]:
        """One optimisation step: its metrics, and whether any process found a checkpoint due."""
        config = self._stage.optimizer
        factor = lr_factor(step, self._stage.total_steps, config.warmup, config.cooldown)
        set_lr(self._optimizers, factor)
        total = 0.0
        report: dict[str, float] = {}
        for loss, part in self._stage.losses(step):
            loss.backward()
            total += float(loss.detach())
            report |= part
        if not self._stage.sharded:
            average_gradients(self._world, self._parameters)
        norm = _number(nn.utils.clip_grad_norm_(self._parameters, config.clip))
        mean, anyone_due = average_scalars(self._world, [total, float(due)])
        finite = math.isfinite(mean) and math.isfinite(norm)
        if finite:
            self._update()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not finite:
            self._nonfinite(step, mean, norm)
        values = {"loss": mean, "grad_norm": norm, **report, "lr": config.lr * factor}
        return values | ({"skipped": self._skipped} if self._skipped else {}), anyone_due > 0

    def _update(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
        self.ema.update()
        self._skipped_run = 0

    def _nonfinite(self, step: int, loss: float, norm: float) -> None:
        """Count a step that changed nothing, or stop; either way say which."""
        self._skipped += 1
        self._skipped_run += 1
        names = gather_names(self._world, self._stage.suspects())
        where = f"stage {self._stage.name}, step {step + 1}: loss {loss}, gradient norm {norm}"
        if names:
            where += f"; examples: {', '.join(names[:8])}"
        if self._stage.on_nonfinite == "skip" and self._skipped_run <= MAX_SKIPPED_RUN:
            if self._world.is_main:
                log.warning("%s; the step is skipped, %d so far", where, self._skipped)
            return
        raise NonFiniteError(
            f"{where}; lower optimizer.lr, mend the data, or let such steps be skipped with "
            "on_nonfinite: skip (the last checkpoint is kept)"
            if self._stage.on_nonfinite == "stop"
            else f"{where}; {self._skipped_run} steps one after another: skipping does not mend it"
        )


def _number(norm: Tensor) -> float:
    """A norm as a number, over all shards."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
