"""Optimisers and the learning-rate schedule."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.distributed import World, sum_over_processes
from trainer.precision import fast_dtype

OptimizerName = Literal["adamw", "muon"]

# Quintic Newton-Schulz coefficients and steps of Jordan (2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class MatrixMuon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for weights of two or more axes; a convolution is [out, in * area].

    ``update = orthogonalised(Nesterov momentum) * 0.2 * sqrt(larger side)``, the scale at which
    AdamW's learning rates carry over (Liu et al. 2025, arXiv 2502.16982). Differs from
    torch.optim.Muon where it is slow on CPUs: the processes of a run share out the matrices, and
    the arithmetic is fp32 where bf16 would be emulated.

    Args:
        weights: fp32, two or more axes each.
        lr: learning rate, on AdamW's scale.
        world: the processes that hold the same gradients; None is this one alone.
        momentum: decay of the gradients' moving average.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lr: float,
        world: World | None = None,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(list(weights), {"lr": lr, "momentum": momentum})
        self._world = world or World()
        self._owners = share_out(weights, self._world.size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients of the weights."""
        assert closure is None
        for group in self.param_groups:
            weights = group["params"]
            directions = [self._direction(weight, group["momentum"]) for weight in weights]
            flat = torch.zeros(sum(weight.numel() for weight in weights), device=weights[0].device)
            updates = flat.split([weight.numel() for weight in weights])
            for owner, direction, update in zip(self._owners, directions, updates, strict=True):
                if owner == self._world.rank and direction is not None:
                    update.copy_(orthogonalised(direction).reshape(-1))
            sum_over_processes(self._world, flat)
            for weight, update in zip(weights, updates, strict=True):
                scale = 0.2 * math.sqrt(max(weight.flatten(1).shape))
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor | None:
        """Nesterov momentum as a matrix ``[out, rest]``; None without a gradient."""
        if weight.grad is None:
            return None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average: Tensor = state["momentum"].lerp_(weight.grad, 1 - momentum)
        direction: Tensor = weight.grad.lerp(average, momentum)
        return direction.flatten(1)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About ``U V^T`` of the singular value decomposition of ``[m, n]``."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / wide.norm().clamp_min(1e-7)).to(fast_dtype(matrix.device.type))
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    direction: Tensor = x if matrix.shape[0] <= matrix.shape[1] else x.T
    return direction.to(matrix.dtype)


def share_out(weights: Sequence[Tensor], num: int) -> list[int]:
    """For every weight the process that orthogonalises it, costly ones dealt out first."""

    def cost(weight: Tensor) -> int:
        rows, columns = sorted(weight.flatten(1).shape)
        return rows * rows * (2 * columns + rows)

    loads, owners = [0] * num, [0] * len(weights)
    for i in sorted(range(len(weights)), key=lambda i: -cost(weights[i])):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += cost(weights[i])
    return owners


def build_optimizers(
    module: nn.Module,
    name: OptimizerName,
    lr: float,
    matrix_lr: float,
    betas: tuple[float, float],
    world: World | None = None,
    eps: float = 1e-8,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Muon orthogonalises each matrix update (Jordan 2024) and scales it to AdamW's size. The input
    and output projections and embeddings stay with AdamW, as its author advises, and so do the
    modulations: they start at zero with all gates closed, and Muon spreads its update over
    directions of the time embedding that carry nothing (docs/adr/0007).

    Args:
        module: to train.
        name: which.
        lr: of AdamW.
        matrix_lr: of Muon.
        betas: of AdamW.
        world: processes that share Muon's work.
        eps: of AdamW.
    """
    trainable = [(k, p) for k, p in module.named_parameters() if p.requires_grad]
    if name == "adamw":
        return [torch.optim.AdamW([p for _, p in trainable], lr, betas, eps, weight_decay=0.0)]
    outer = ("x_embedder", "final_layer", "time_embedder", "modulation", "embed_tokens", "heads")
    matrices = [p for k, p in trainable if p.ndim >= 2 and not any(o in k for o in outer)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in trainable if id(p) not in chosen]
    return [
        MatrixMuon(matrices, matrix_lr, world),
        torch.optim.AdamW(rest, lr, betas, eps, weight_decay=0.0),
    ]


def lr_factor(step: int, total: int, warmup: int, cooldown_share: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last share of the steps."""
    if step < warmup:
        return (step + 1) / warmup
    cooldown = max(1, int(total * cooldown_share))
    return min(1.0, (total - step) / cooldown) if cooldown_share > 0 else 1.0


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's initial learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
