"""What a checkpoint holds of a stage: weights, averages and optimiser state, by name."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.distributed import World
from trainer.ema import Ema


class TrainingState:
    """Saves and restores everything that moves during training.

    Sharded weights are saved by shard and restored to whatever sharding there is then.
    """

    def __init__(
        self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: Ema
    ) -> None:
        self._module, self._optimizers, self._ema = module, optimizers, ema

    def save(self, folder: Path, step: int, skipped: int, world: World) -> None:
        """Write the state after ``step`` steps, of which ``skipped`` changed nothing."""
        tensors = self._weights()
        for name, _, state in self._parameters():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        progress = {"ema_steps": self._ema.steps, "skipped": skipped}
        checkpoint.save(folder, step, tensors, progress, world)

    def restore(self, folder: Path, world: World) -> tuple[int, int]:
        """Load the newest checkpoint; steps done and steps skipped, zeros without one."""
        path = checkpoint.newest(folder)
        if path is None:
            return self._restore_legacy(folder), 0
        progress = checkpoint.read_progress(path)
        saved = checkpoint.shapes(path)
        tensors = self._weights()
        for name, parameter, state in self._parameters():
            prefix = f"optimizer.{name}."
            for key, entry in saved.items():
                if key.startswith(prefix) and "." not in key.removeprefix(prefix):
                    like = entry.size == parameter.shape
                    dtype = entry.properties.dtype
                    fresh = (
                        torch.zeros_like(parameter.detach(), dtype=dtype)
                        if like
                        else torch.zeros(entry.size, dtype=dtype)
                    )
                    tensors[key] = state[key.removeprefix(prefix)] = fresh
        checkpoint.load(path, tensors, world)
        self._ema.steps = int(progress["ema_steps"])
        return int(progress["step"]), int(progress["skipped"])

    def _weights(self) -> dict[str, Tensor]:
        """Weights and averages by name; loading fills them in place."""
        weights = {f"module.{key}": value for key, value in self._module.state_dict().items()}
        return weights | {f"ema.{key}": value for key, value in self._ema.average.items()}

    def _parameters(self) -> list[tuple[str, Tensor, dict[str, Tensor]]]:
        """Every optimised parameter's name, itself and its optimiser's state of it."""
        names = {id(p): name for name, p in self._module.named_parameters()}
        return [
            (names[id(parameter)], parameter, optimizer.state[parameter])
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def _restore_legacy(self, folder: Path) -> int:
        state = checkpoint.load_legacy(folder)
        if state is None:
            return 0
        self._module.load_state_dict(state["module"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._ema.load_state_dict(state["ema"])
        return int(state["step"])
