"""RMS normalisation with an optional modulation scale."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """Normalise the last axis by its root mean square; statistics in fp32.

    ``y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale)`` (Lumina-Image 2.0, Next-DiT block).

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``.
        eps: added to the mean square.
        scale: broadcastable to ``x``, the modulation scale; None means no modulation.

    Returns:
        ``[..., D]`` in the dtype of ``weight``.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    normed = normed.to(weight.dtype) * weight
    return normed if scale is None else normed * (1 + scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    """Like :func:`rms_norm_ref`; the fastest implementation for the device."""
    return rms_norm_ref(x, weight, eps, scale)
