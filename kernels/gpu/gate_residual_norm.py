"""Gate, residual and next norm: one read of both streams, one write of each result."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Launch, block_of, rows_of, warps_of, weight_rows
from kernels.gpu.rms_norm import inverse_rms, row_of


@triton.jit
def gate_residual_norm_kernel(
    stream_ptr, normed_ptr, branch_ptr, residual_ptr, gate_ptr, scale_ptr, index_ptr,
    branch_stride, residual_stride, gate_stride, scale_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `launch_gate_residual_norm`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    branch = tl.load(branch_ptr + row * branch_stride + column, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
    weight_row = row_of(index_ptr, row)
    gate = tl.load(gate_ptr + weight_row * gate_stride + column, mask=inside, other=0.0)
    branch = branch.to(tl.float32)
    gated = branch * inverse_rms(branch, eps, WIDTH) * gate.to(tl.float32)
    stream = residual.to(tl.float32) + gated
    out = row * WIDTH + column
    tl.store(stream_ptr + out, stream.to(stream_ptr.dtype.element_ty), mask=inside)
    if normed_ptr is not None:
        scale = tl.load(scale_ptr + weight_row * scale_stride + column, mask=inside, other=0.0)
        normed = stream * inverse_rms(stream, eps, WIDTH) * scale.to(tl.float32)
        tl.store(normed_ptr + out, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def launch_gate_residual_norm(
    stream: Tensor,
    normed: Tensor | None,
    branch: Tensor,
    residual: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    eps: float,
    index: Tensor | None,
) -> Launch:
    """Write ``residual + RMS(branch) gate`` and, where asked for, ``RMS(that) scale``.

    Args:
        stream: ``[T, D]`` contiguous, written.
        normed: ``[T, D]`` contiguous, written; None with ``scale``: no next norm.
        branch: ``[T, D]``; rows may be strided.
        residual: ``[T, D]``; rows may be strided.
        gate: ``[D]``, ``[1, D]``, ``[T, D]``, or ``[n, D]`` with an index.
        scale: likewise, with as many rows.
        eps: added to both mean squares.
        index: ``[T]``, each token's row of the weights.
    """
    assert (normed is None) == (scale is None)
    branch, residual = rows_of(branch), rows_of(residual)
    rows, width = branch.shape
    gate, gate_stride = weight_rows(gate, rows, index)
    scale_stride = 0
    if scale is not None:
        scale, scale_stride = weight_rows(scale, rows, index)
    block = block_of(width)
    return Launch(
        kernel=gate_residual_norm_kernel,
        grid=(rows,),
        arguments={
            "stream_ptr": stream, "normed_ptr": normed, "branch_ptr": branch,
            "residual_ptr": residual, "gate_ptr": gate, "scale_ptr": scale,
            "index_ptr": index if gate_stride or scale_stride else None,
            "branch_stride": branch.stride(0), "residual_stride": residual.stride(0),
            "gate_stride": gate_stride, "scale_stride": scale_stride, "eps": eps,
        },
        constants={"WIDTH": width, "BLOCK": block},
        num_warps=warps_of(block),
    )  # fmt: skip
