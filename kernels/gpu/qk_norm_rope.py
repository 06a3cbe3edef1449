"""QK-norm and rotation straight from the fused projection: a program turns some heads of a token.

A head is read and written once, as it lies; its pairs are told apart in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Launch, block_of, warps_of
from kernels.gpu.rms_norm import inverse_rms

HEADS_PER_PROGRAM = 8  # divides the 24 query and the 8 key heads of the released model


@triton.jit
def _turn_heads(
    out_ptr, x_ptr, weight_ptr, cos, sin, row, first, row_stride, head_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    head = first + tl.arange(0, HEADS_BLOCK)[:, None]
    column = tl.arange(0, 2 * HALF_BLOCK)
    inside = (head < HEADS) & (column < 2 * HALF)[None, :]
    x_row = x_ptr + row * row_stride + head * head_stride
    x = tl.load(x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < 2 * HALF, other=0.0).to(tl.float32)
    normed = x * inverse_rms(x, eps, 2 * HALF)[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(normed, (HEADS_BLOCK, HALF_BLOCK, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    out = tl.reshape(turned, (HEADS_BLOCK, 2 * HALF_BLOCK)).to(out_ptr.dtype.element_ty)
    out_row = out_ptr + (row * HEADS + head) * (2 * HALF)
    tl.store(out_row + column[None, :], out, mask=inside)


@triton.jit
def qk_norm_rope_kernel(
    new_q_ptr, new_k_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride, eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """See `launch_qk_norm_rope`."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, HALF_BLOCK)
    inside = pair < HALF
    cos = tl.load(cos_ptr + row * cos_stride + pair, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * sin_stride + pair, mask=inside, other=0.0)[None, :]
    q_blocks: tl.constexpr = (Q_HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    block = tl.program_id(1)
    if block < q_blocks:
        _turn_heads(
            new_q_ptr, q_ptr, q_weight_ptr, cos, sin, row, block * HEADS_BLOCK,
            q_stride, q_head_stride, eps, Q_HEADS, HALF, HEADS_BLOCK, HALF_BLOCK,
        )  # fmt: skip
    else:
        _turn_heads(
            new_k_ptr, k_ptr, k_weight_ptr, cos, sin, row, (block - q_blocks) * HEADS_BLOCK,
            k_stride, k_head_stride, eps, K_HEADS, HALF, HEADS_BLOCK, HALF_BLOCK,
        )  # fmt: skip


def launch_qk_norm_rope(
    new_q: Tensor,
    new_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Launch:
    """Normalise and rotate the heads of ``q`` and ``k``; shapes as in `kernels.qk_norm_rope`.

    Args:
        new_q: as ``q`` in shape, contiguous, written.
        new_k: as ``k`` in shape, contiguous, written.
        q: ``[T, heads, head_dim]``; tokens and heads may be strided.
        k: ``[T, kv_heads, head_dim]``, likewise.
        q_weight: ``[head_dim]``.
        k_weight: ``[head_dim]``.
        cos: ``[T, head_dim / 2]`` fp32; tokens may be strided.
        sin: likewise.
        eps: of the normalisation.
    """
    q, k, q_weight, k_weight, cos, sin = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, q_weight, k_weight, cos, sin)
    )
    (tokens, q_heads, head_dim), k_heads = q.shape, k.shape[1]
    heads_block, half_block = HEADS_PER_PROGRAM, block_of(head_dim // 2)
    return Launch(
        kernel=qk_norm_rope_kernel,
        grid=(tokens, -(-q_heads // heads_block) - (-k_heads // heads_block)),
        arguments={
            "new_q_ptr": new_q, "new_k_ptr": new_k, "q_ptr": q, "k_ptr": k,
            "q_weight_ptr": q_weight, "k_weight_ptr": k_weight, "cos_ptr": cos, "sin_ptr": sin,
            "q_stride": q.stride(0), "q_head_stride": q.stride(1),
            "k_stride": k.stride(0), "k_head_stride": k.stride(1),
            "cos_stride": cos.stride(0), "sin_stride": sin.stride(0), "eps": eps,
        },
        constants={
            "Q_HEADS": q_heads, "K_HEADS": k_heads, "HALF": head_dim // 2,
            "HEADS_BLOCK": heads_block, "HALF_BLOCK": half_block,
        },
        num_warps=warps_of(heads_block * 2 * half_block),
    )  # fmt: skip
