"""Losses: flow matching for the transformer, reconstruction for the autoencoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_timesteps(num: int, shift: float, generator: torch.Generator) -> Tensor:
    """Shifted log-normal timesteps ``t = sigmoid(u - shift)``, u ~ N(0, 1).

    Lumina-Image 2.0's training distribution; a larger shift trains nearer to noise (t = 0).

    Returns:
        ``[num]`` fp32 in (0, 1).
    """
    return torch.sigmoid(torch.randn(num, generator=generator) - shift)


def velocity_loss(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Mean squared velocity error of each sample: ``[n]`` fp32."""
    return torch.stack(
        [(p.float() - t).square().mean() for p, t in zip(predicted, target, strict=True)]
    )


def reconstruction_loss(
    images: Tensor, decoded: Tensor, gradient_weight: float
) -> tuple[Tensor, Tensor]:
    """L1 + L2 + L1 of the horizontal and vertical differences, weighted by 1 / contrast.

    Without the weight, shapes that differ little from their ground would be blurred away: their
    share of the plain loss is small.

    Args:
        images: ``[B, 3, H, W]`` in [-1, 1].
        decoded: like ``images``.
        gradient_weight: of the differences.

    Returns:
        The loss, and the plain mean squared error for reporting.
    """
    decoded = decoded.float()
    error = decoded - images
    per_image = error.abs().mean((1, 2, 3)) + error.square().mean((1, 2, 3))
    horizontal = (error[..., 1:] - error[..., :-1]).abs().mean((1, 2, 3))
    vertical = (error[..., 1:, :] - error[..., :-1, :]).abs().mean((1, 2, 3))
    per_image = per_image + gradient_weight * (horizontal + vertical)
    weight = (0.5 / images.std((1, 2, 3)).clamp_min(1e-3)).clamp(0.5, 3.0)
    return (per_image * weight).mean(), F.mse_loss(decoded, images).detach()


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over latent numbers of the KL divergence from a standard normal."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
