"""RMS normalisation, with one weight for all tokens or one for each."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis by its root mean square; statistics in fp32.

    ``y = x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019).

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, or ``[..., D]`` where a modulation or a gate is folded into it.
        eps: added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``weight``.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like :func:`rms_norm_ref`; the fastest implementation for the device."""
    return rms_norm_ref(x, weight, eps)
