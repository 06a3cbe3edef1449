"""A kernel with all it is launched with: to run it, or to compile it where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

WARP_ELEMENTS = 512  # of a row per warp: 16 registers in each thread for every tensor
MAX_WARPS = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: compiled at its first call for these dtypes and constants.
        grid: programs along each axis; none at all where one is 0.
        arguments: by name, what may differ between calls of one compiled kernel.
        constants: by name, what a kernel is compiled for.
        num_warps: of each program.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, int]
    num_warps: int

    def __call__(self) -> None:
        """Run it on the device of its tensors, which need not be the current one."""
        if 0 in self.grid:
            return
        first = next(iter(self.arguments.values()))
        assert isinstance(first, Tensor)
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.num_warps)


def block_of(width: int) -> int:
    """The power of two that holds so many elements."""
    block: int = triton.next_power_of_2(width)
    return block


def warps_of(elements: int) -> int:
    """Warps of a program that works on so many elements, a power of two."""
    return min(max(elements // WARP_ELEMENTS, 1), MAX_WARPS)


def rows_of(x: Tensor) -> Tensor:
    """``[..., D]`` as ``[rows, D]`` with neighbouring features; a copy only where a view cannot."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def weight_rows(weight: Tensor, rows: int, index: Tensor | None) -> tuple[Tensor, int]:
    """A weight ``[D]``, ``[1, D]``, ``[rows, D]`` or ``[n, D]`` by index, and its row's stride.

    One row for all has the stride 0, whatever the index says.
    """
    weight = rows_of(weight)
    assert index is not None or weight.shape[0] in (1, rows), (weight.shape, rows)
    return weight, 0 if weight.shape[0] == 1 else weight.stride(0)
