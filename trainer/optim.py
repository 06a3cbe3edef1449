"""Optimisers and the learning-rate schedule."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

OptimizerName = Literal["adamw", "muon"]


class MatrixMuon(torch.optim.Muon):
    """torch's Muon for weights of two or more axes; a convolution is a matrix [out, in * area]."""

    def __init__(self, weights: Sequence[Tensor], lr: float) -> None:
        self._weights = tuple(weights)
        assert all(weight.is_contiguous() for weight in weights)
        # Views of the same memory: what the optimiser writes, the module sees.
        views = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(views, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self._views = views

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients of the weights."""
        assert closure is None
        for view, weight in zip(self._views, self._weights, strict=True):
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()  # type: ignore[no-untyped-call]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights and of their views."""
        super().zero_grad(set_to_none)
        for weight in self._weights:
            weight.grad = None


def build_optimizers(
    module: nn.Module, name: OptimizerName, lr: float, matrix_lr: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Muon orthogonalises each matrix update (Jordan 2024) and scales it to AdamW's size. The input
    and output projections and embeddings stay with AdamW, as its author advises.

    Args:
        module: to train.
        name: which.
        lr: of AdamW.
        matrix_lr: of Muon.
        betas: of AdamW.
    """
    trainable = [(k, p) for k, p in module.named_parameters() if p.requires_grad]
    if name == "adamw":
        return [torch.optim.AdamW([p for _, p in trainable], lr, betas, weight_decay=0.0)]
    outer = ("x_embedder", "final_layer", "time_embedder", "embed_tokens", "heads")
    matrices = [p for k, p in trainable if p.ndim >= 2 and not any(o in k for o in outer)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in trainable if id(p) not in chosen]
    return [
        MatrixMuon(matrices, matrix_lr),
        torch.optim.AdamW(rest, lr, betas, weight_decay=0.0),
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
