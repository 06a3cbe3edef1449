"""What every attention backend offers, and what keeps one from being used.

Shapes: T = tokens of all sequences, n = sequences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model.packing import Layout

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Attend(Protocol):
    """Softmax attention inside every sequence of one layout.

    Grouped queries: key/value head j serves query heads ``j*r .. j*r + r - 1``.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """``[T, heads, head_dim]`` from q of that shape and k, v ``[T, kv_heads, head_dim]``."""


Plan = Callable[[Layout], Attend]


class UnavailableError(Exception):
    """A backend cannot be used; the message says why, as the end of a sentence."""


def require_cuda(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, max_head_dim: int
) -> None:
    """Refuse what no fused CUDA kernel takes."""
    if device.type != "cuda":
        raise UnavailableError("it needs a CUDA device")
    if dtype not in LOW_PRECISION:
        raise UnavailableError(f"it has no {str(dtype).removeprefix('torch.')} kernel")
    if head_dim % 8 or head_dim > max_head_dim:
        raise UnavailableError(f"head_dim {head_dim} is not a multiple of 8 up to {max_head_dim}")


def probe(plan: Plan, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Attend once over a few tokens, so that a kernel that is missing is missed now.

    Where all values are one, so is every mean of them.

    Raises:
        UnavailableError: with the first line of what the kernel said.
    """
    try:
        layout = Layout.of([5, 2, 3], device)
        q = torch.ones(layout.num_tokens, 3, head_dim, device=device, dtype=dtype)
        k = torch.ones(layout.num_tokens, 1, head_dim, device=device, dtype=dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's list of what each kernel would have wanted
            out = plan(layout)(q, k, k)
            right = out.shape == q.shape and torch.allclose(out, q, atol=0.02)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
        lines = str(error).strip().splitlines()
        raise UnavailableError(lines[0] if lines else type(error).__name__) from error
    if not right:
        raise UnavailableError("its result on this device is wrong")
