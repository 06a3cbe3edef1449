"""SiLU of one half times the other: a program computes a piece of one row."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import Launch, block_of, rows_of, warps_of

PIECE = 1024  # features per program


@triton.jit
def silu_mul_kernel(out_ptr, gate_up_ptr, gate_up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """See `launch_silu_mul`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))  # at most 1, whatever the gate's sign: nothing overflows
    sigmoid = tl.div_rn(tl.where(gate < 0, decay, 1.0), 1.0 + decay)
    out = gate * sigmoid * up
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def launch_silu_mul(out: Tensor, gate_up: Tensor) -> Launch:
    """Write ``SiLU(gate) up``.

    Args:
        out: ``[..., F]`` contiguous, written.
        gate_up: ``[..., 2 F]``, the gate half first; rows may be strided.
    """
    gate_up = rows_of(gate_up)
    width = gate_up.shape[-1] // 2
    block = min(block_of(width), PIECE)
    return Launch(
        kernel=silu_mul_kernel,
        grid=(gate_up.shape[0], -(-width // block)),
        arguments={
            "out_ptr": out, "gate_up_ptr": gate_up, "gate_up_stride": gate_up.stride(0)
        },
        constants={"WIDTH": width, "BLOCK": block},
        num_warps=warps_of(2 * block),
    )  # fmt: skip
