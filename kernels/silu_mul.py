"""The gate of the SwiGLU feed-forward."""

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import plain_inference


def silu_mul(gate_up: Tensor) -> Tensor:
    """``SiLU(gate) * up`` on the two halves of one fused projection.

    Args:
        gate_up: ``[..., 2 * F]``, the gate half first.

    Returns:
        ``[..., F]``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if plain_inference(gate_up):
        return F.silu(gate).mul_(up)
    return F.silu(gate) * up
