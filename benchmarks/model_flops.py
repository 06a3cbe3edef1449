"""Useful arithmetic of a forward, and what of it a device can do: for model FLOP utilisation (MFU).

Counted are the matrix products and the attention of the noise refiner and the joint blocks, two
operations for a multiply-add. What a step may look up instead (context refiner, modulation) does
not count, nor do embedders and the final layer, a thousandth of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from model.config import NextDiTConfig


def block_flops(config: NextDiTConfig, tokens: int) -> int:
    """Of one block over one sequence."""
    d, kv_dim = config.hidden_size, config.num_kv_heads * config.head_dim
    products = 2 * tokens * (d * (d + 2 * kv_dim) + d * d + 3 * d * config.ffn_dim)
    return products + 4 * tokens * tokens * d


def forward_flops(config: NextDiTConfig, sequences: Sequence[tuple[int, int]]) -> int:
    """Of one evaluation over sequences of (caption tokens, image tokens)."""
    return sum(
        config.num_refiner_layers * block_flops(config, image)
        + config.num_layers * block_flops(config, caption + image)
        for caption, image in sequences
    )


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a square matrix product of random numbers: the best of five."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    repeats, best = 10, 0.0
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = max(best, repeats * 2 * side**3 / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
