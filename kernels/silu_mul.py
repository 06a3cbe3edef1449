"""The gate of the SwiGLU feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import plain_inference
from kernels.dispatch import uses_kernel, works


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    """``SiLU(gate) * up`` on the two halves of one fused projection.

    Args:
        gate_up: ``[..., 2 * F]``, the gate half first.

    Returns:
        ``[..., F]`` in the same dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _compute(gate_up: Tensor) -> Tensor:
    """The kernel where Triton works, for tensors that `uses_kernel` let pass."""
    if not works(gate_up.device):
        return silu_mul_ref(gate_up)
    from kernels.gpu.silu_mul import launch_silu_mul

    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    launch_silu_mul(out, gate_up)()
    return out


silu_mul_op = torch.library.custom_op(
    "lumina::silu_mul", _compute, mutates_args=(), schema="(Tensor gate_up) -> Tensor"
)


@silu_mul_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Like :func:`silu_mul_ref`; the fastest implementation for the device."""
    if uses_kernel("silu_mul", gate_up):
        compute = silu_mul_op if torch.compiler.is_compiling() else _compute
        return compute(gate_up)
    if plain_inference(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    return silu_mul_ref(gate_up)
