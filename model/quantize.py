"""Matrix products in fp8 (e4m3): rowwise scales, those of activations found anew for every token.

Only the four products of a joint block are quantised, and not in the last blocks: embedders,
refiners, norms, modulation and the final layer decide fine things and cost little
(docs/performance.md). LoRAs merged at load are part of what is quantised; those of requests are
added to the quantised product in the dtype of the activations.

Shapes: T = tokens, I = inputs, O = outputs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.adapters import Linear, Spans, adapt
from model.layers import Block

if TYPE_CHECKING:
    from model.next_dit import NextDiT

QUANTIZATIONS = ("none", "fp8")
FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
MIN_CAPABILITY = (8, 9)  # Ada and later multiply fp8
EXEMPT_LATE = 0.15  # of the joint blocks, at the end, stay as they are
MULTIPLE = 16  # of both sides of a weight, for the kernel
TINY = 1e-12  # a row of zeros is divided by this


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in fp8, scaled so that its largest magnitude is the largest that fp8 has.

    Args:
        x: ``[rows, I]``, any floating dtype.

    Returns:
        ``[rows, I]`` e4m3 and scales ``[rows, 1]`` fp32, with ``x ~ quantised * scale``.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def scaled_matmul_ref(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``[T, O]`` fp32 of ``[T, I]``, ``[T, 1]``, ``[O, I]`` and ``[O, 1]``."""
    return (x.float() @ weight.float().T) * x_scale * weight_scale.T


def scaled_matmul(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scaled_matmul_ref` in `dtype`; on a GPU by torch's own kernel, which knows bf16 results."""
    if not x.is_cuda:
        return scaled_matmul_ref(x, x_scale, weight, weight_scale).to(dtype)
    out: Tensor = torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


class Fp8Linear(nn.Module):
    """A bias-free `model.adapters.Linear` whose weight is kept and multiplied in fp8.

    Attributes:
        weight: ``[O, I]`` e4m3.
        weight_scale: ``[O, 1]`` fp32.
        name: as `Linear.name`.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        assert "bias" not in dict(linear.named_parameters())
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.name: str = linear.name

    def forward(self, x: Tensor, spans: Spans = ()) -> Tensor:
        """``[T, I]`` to ``[T, O]`` in the dtype of x, with the adapters of ``spans`` added."""
        quantized, scale = quantize_rows(x)
        out = scaled_matmul(quantized, scale, self.weight, self.weight_scale, x.dtype)
        return adapt(out, x, self.name, spans)


def check_quantize(name: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Whether weights of this dtype can be quantised so on a device.

    Raises:
        ValueError: one sentence that says what is missing.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantize {name!r} is not allowed: give {' or '.join(QUANTIZATIONS)}")
    if name == "none":
        return
    device = torch.device(device)
    needs = "quantize 'fp8' needs a CUDA device of compute capability 8.9 or newer"
    if device.type != "cuda":
        raise ValueError(f"{needs}; this one is a {device.type.upper()}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(f"{needs}; this one has {capability[0]}.{capability[1]}")
    if dtype != torch.bfloat16:
        raise ValueError(
            "quantize 'fp8' needs precision 'bf16' or 'mixed'; the weights here are "
            f"{str(dtype).removeprefix('torch.')}"
        )


def quantize_fp8(dit: NextDiT) -> int:
    """Replace the products of all but the last joint blocks, in place; returns how many.

    Weights whose sides the kernel cannot take stay as they are.
    """
    blocks = list(dit.layers)
    replaced = 0
    for block in blocks[: len(blocks) - math.ceil(EXEMPT_LATE * len(blocks))]:
        assert isinstance(block, Block)
        for owner, name in (
            (block.attention, "qkv"),
            (block.attention, "out"),
            (block.feed_forward, "gate_up"),
            (block.feed_forward, "down"),
        ):
            linear = getattr(owner, name)
            if not any(side % MULTIPLE for side in linear.weight.shape):
                setattr(owner, name, Fp8Linear(linear))
                replaced += 1
    return replaced
