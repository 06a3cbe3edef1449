"""Every kernel on the tensors of the 2.6B network: what is benchmarked, and compiled for GPUs.

Needs torch and triton, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gate_residual_norm import (
    gate_residual,
    gate_residual_norm,
    gate_residual_norm_ref,
    gate_residual_ref,
)
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.silu_mul import silu_mul, silu_mul_ref
from model.config import NAMED_CONFIGS, NextDiTConfig

EPS = 1e-5
RELEASED = NAMED_CONFIGS["2.6B"]
TINY = NextDiTConfig(
    hidden_size=24, num_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
    axes_dim_rope=(4, 4, 4),
)  # fmt: skip
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An operator with arguments as a block passes them.

    Attributes:
        operator: its name in `kernels.dispatch.DEFAULTS`.
        name: of the case.
        call: the public function.
        reference: the eager one.
        arguments: of both.
    """

    operator: str
    name: str
    call: Callable[..., object]
    reference: Callable[..., object]
    arguments: tuple[Tensor | float | None, ...]


def drawn_on(device: str, seed: int = 0) -> Draw:
    """Draws normal numbers of a shape and dtype; on `meta` only their shape."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        numbers = torch.randn(*shape, generator=generator, device=device)
        return numbers.to(dtype)

    return draw


def cases(
    device: str, tokens: int, sequences: int = 2, config: NextDiTConfig = RELEASED
) -> list[Case]:
    """Every operator in bf16, and where the stream is fp32 (precision `mixed`) with that too.

    Args:
        device: where the tensors are made; `meta` makes none.
        tokens: of all sequences.
        sequences: rows of the folded weights.
        config: of the network.
    """
    draw = drawn_on(device)
    index = torch.arange(tokens, device=device) * sequences // max(tokens, 1)
    return [
        *_rms_norms(draw, tokens, sequences, index, config.hidden_size),
        *_residual_norms(draw, tokens, sequences, index, config.hidden_size),
        _qk_norm_rope(draw, tokens, config),
        Case(
            "silu_mul", "silu_mul", silu_mul, silu_mul_ref, (draw(tokens, 2 * config.ffn_dim),)
        ),
    ]  # fmt: skip


def _rms_norms(draw: Draw, tokens: int, n: int, index: Tensor, width: int) -> list[Case]:
    found = []
    for kind, dtype in (("bf16", torch.bfloat16), ("mixed", torch.float32)):
        x = draw(tokens, width, dtype=dtype)
        for what, weight, rows in (
            ("one weight", draw(width), None),
            ("by sequence", draw(n, width), index),
        ):
            name = f"rms_norm, {what}, {kind}"
            found.append(Case("rms_norm", name, rms_norm, rms_norm_ref, (x, weight, EPS, rows)))
    return found


def _residual_norms(draw: Draw, tokens: int, n: int, index: Tensor, width: int) -> list[Case]:
    found = []
    branch, scale = draw(tokens, width), draw(n, 2 * width)[:, :width]
    for kind, dtype in (("bf16", torch.bfloat16), ("mixed", torch.float32)):
        residual = draw(tokens, width, dtype=dtype)
        gate = draw(n, 2 * width, dtype=dtype)[:, width:]
        for name, call, reference, weights in (
            ("gate_residual_norm", gate_residual_norm, gate_residual_norm_ref, (gate, scale)),
            ("gate_residual", gate_residual, gate_residual_ref, (gate,)),
        ):
            arguments = (branch, residual, *weights, EPS, index)
            found.append(Case("gate_residual_norm", f"{name}, {kind}", call, reference, arguments))
    return found


def _qk_norm_rope(draw: Draw, tokens: int, config: NextDiTConfig) -> Case:
    heads, kv_heads, dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
    qkv = draw(tokens, heads + 2 * kv_heads, dim)
    q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = draw(tokens, dim // 2, dtype=torch.float32)
    arguments = (q, k, draw(dim), draw(dim), angles.cos(), angles.sin(), EPS)
    return Case("qk_norm_rope", "qk_norm_rope", qk_norm_rope, qk_norm_rope_ref, arguments)
