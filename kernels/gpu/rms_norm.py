"""RMSNorm: a program normalises one row, so a row's sums never depend on its neighbours."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Launch, block_of, rows_of, warps_of, weight_rows


@triton.jit
def inverse_rms(x, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) along the last axis, correctly rounded operations throughout."""
    mean_square = tl.div_rn(tl.sum(x * x, axis=-1), 1.0 * WIDTH)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))


@triton.jit
def row_of(index_ptr, row):
    """The row's entry of an index, or without one the row itself; 64 bits either way."""
    found = row
    if index_ptr is not None:
        found = tl.load(index_ptr + row).to(tl.int64)
    return found


@triton.jit
def rms_norm_kernel(
    out_ptr, x_ptr, weight_ptr, index_ptr, x_stride, weight_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `launch_rms_norm`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight_row = weight_ptr + row_of(index_ptr, row) * weight_stride
    weight = tl.load(weight_row + column, mask=inside, other=0.0).to(tl.float32)
    out = x * inverse_rms(x, eps, WIDTH) * weight
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def launch_rms_norm(
    out: Tensor, x: Tensor, weight: Tensor, eps: float, index: Tensor | None
) -> Launch:
    """Normalise ``x`` into ``out``; shapes as in `kernels.rms_norm.rms_norm`.

    Args:
        out: as ``x`` in shape, contiguous.
        x: ``[..., D]``; rows may be strided.
        weight: ``[D]``, ``[..., D]``, or ``[n, D]`` with an index.
        eps: added to the mean square.
        index: ``[rows]``, each row's weight; None: its own, or the only one.
    """
    x = rows_of(x)
    rows, width = x.shape
    weight, weight_stride = weight_rows(weight, rows, index)
    block = block_of(width)
    return Launch(
        kernel=rms_norm_kernel,
        grid=(rows,),
        arguments={
            "out_ptr": out, "x_ptr": x, "weight_ptr": weight,
            "index_ptr": index if weight_stride else None,
            "x_stride": x.stride(0), "weight_stride": weight_stride, "eps": eps,
        },
        constants={"WIDTH": width, "BLOCK": block},
        num_warps=warps_of(block),
    )  # fmt: skip
