"""Per-head RMS normalisation of queries and keys, followed by the rotary embedding."""

import torch
from torch import Tensor

from kernels.cpu import plain_inference
from kernels.dispatch import uses_kernel, works
from kernels.rms_norm import rms_norm, rms_norm_ref


def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent feature pairs ``(2i, 2i+1)`` by the angle of their position, in fp32.

    Args:
        x: ``[T, heads, head_dim]``.
        cos: ``[T, head_dim / 2]`` fp32.
        sin: ``[T, head_dim / 2]`` fp32.

    Returns:
        ``[T, heads, head_dim]`` fp32.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def qk_norm_rope_ref(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of q and k, then rotate them (QK-norm before RoPE).

    Args:
        q: ``[T, heads, head_dim]``; a slice of the fused projection will do.
        k: ``[T, kv_heads, head_dim]``, likewise.
        q_weight: ``[head_dim]``.
        k_weight: ``[head_dim]``.
        cos: ``[T, head_dim / 2]`` fp32.
        sin: ``[T, head_dim / 2]`` fp32.
        eps: of the normalisation.

    Returns:
        q and k in their shapes and the dtype they came in.
    """
    # fp32 weights keep the normalised heads in fp32, so that they are rounded once, after turning.
    rotated_q = rotate_ref(rms_norm_ref(q, q_weight.float(), eps), cos, sin).to(q.dtype)
    rotated_k = rotate_ref(rms_norm_ref(k, k_weight.float(), eps), cos, sin).to(k.dtype)
    return rotated_q, rotated_k


def _compute(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The kernel where Triton works, for tensors that `uses_kernel` let pass."""
    if not works(q.device):
        return qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, eps)
    from kernels.gpu.qk_norm_rope import launch_qk_norm_rope

    new_q, new_k = q.new_empty(q.shape), k.new_empty(k.shape)
    launch_qk_norm_rope(new_q, new_k, q, k, q_weight, k_weight, cos, sin, eps)()
    return new_q, new_k


qk_norm_rope_op = torch.library.custom_op(
    "lumina::qk_norm_rope",
    _compute,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps) -> (Tensor, Tensor)",
)


@qk_norm_rope_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Like :func:`qk_norm_rope_ref`; the fastest implementation for the device."""
    if uses_kernel("qk_norm_rope", q, k, q_weight, k_weight, cos, sin):
        compute = qk_norm_rope_op if torch.compiler.is_compiling() else _compute
        return compute(q, k, q_weight, k_weight, cos, sin, eps)
    if plain_inference(q, k, q_weight, k_weight, cos, sin):
        new_q, new_k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
        for new in (new_q, new_k):
            _rotate_in_place(new, cos[:, None], sin[:, None])
        return new_q, new_k
    return qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, eps)


def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rotate_ref` without a copy of ``x``: one temporary of half its size.

    Args:
        x: ``[T, heads, head_dim]`` fp32, changed.
        cos: ``[T, 1, head_dim / 2]`` fp32.
        sin: ``[T, 1, head_dim / 2]`` fp32.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    carried = even * sin
    even.mul_(cos).addcmul_(odd, sin, value=-1.0)
    odd.mul_(cos).add_(carried)
