"""RMS normalisation, with one weight for all tokens or one for each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import plain_inference


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis by its root mean square; fp32 inside, rounded once at the end.

    ``y = x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019). Input and weight may
    differ in dtype: a wide residual stream with narrow weights gives what a narrow matrix product
    takes, and a narrow x with wide weights what a wide stream is added to.

    Args:
        x: ``[..., D]``, any floating dtype.
        weight: ``[D]``, or ``[..., D]`` where a modulation or a gate is folded into it.
        eps: added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of ``weight``.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like :func:`rms_norm_ref`; the fastest implementation for the device."""
    if plain_inference(x, weight):
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    return rms_norm_ref(x, weight, eps)
