"""Backends that take sequences of equal length as one dense batch, a call for each length.

The query heads of one group are stacked along the query length, so keys and values are never
repeated, and every kernel of scaled dot-product attention takes it. That is right because nothing
is causal here: the order along the query length has no meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention.plan import Attend, Plan, UnavailableError, probe, require_cuda
from model.packing import Layout, Run

# cuDNN refuses some shapes (a single token, for one): then the next of these that can.
CUDNN_FIRST = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True, slots=True)
class SdpaAttend:
    """Whatever kernel torch chooses; on a CPU with gradients, the product written out."""

    runs: tuple[Run, ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        outputs = [self._run(q, k, v, run) for run in self.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
        query, key, value = dense_views(q, k, v, run)
        if q.requires_grad and not q.is_cuda:
            out = _written_out(query, key, value)
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return packed_tokens(out, q.shape[1], run)


@dataclass(frozen=True, slots=True)
class CudnnAttend:
    """cuDNN's kernel, the Hopper-class one that every CUDA build of torch has."""

    runs: tuple[Run, ...]
    kernels: tuple[SDPBackend, ...] = CUDNN_FIRST

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        outputs = []
        with sdpa_kernel(list(self.kernels), set_priority=True):
            for run in self.runs:
                out = F.scaled_dot_product_attention(*dense_views(q, k, v, run))
                outputs.append(packed_tokens(out, q.shape[1], run))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def dense_views(q: Tensor, k: Tensor, v: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a run as ``[count, kv_heads, length, head_dim]``, queries ``r * length`` long.

    Keys and values are views.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    tokens = slice(run.start, run.stop)
    query = q[tokens].view(run.count, run.length, kv_heads, groups, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(run.count, kv_heads, -1, head_dim)
    key = k[tokens].view(run.count, run.length, kv_heads, head_dim).transpose(1, 2)
    value = v[tokens].view(run.count, run.length, kv_heads, head_dim).transpose(1, 2)
    return query, key, value


def packed_tokens(out: Tensor, heads: int, run: Run) -> Tensor:
    """The inverse of `dense_views` for queries: ``[count * length, heads, head_dim]``."""
    count, kv_heads, _, head_dim = out.shape
    out = out.view(count, kv_heads, heads // kv_heads, run.length, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)


def open_sdpa(device: torch.device, dtype: torch.dtype, head_dim: int) -> Plan:
    """Takes every device, dtype and size."""
    return plan_sdpa


def open_cudnn(device: torch.device, dtype: torch.dtype, head_dim: int) -> Plan:
    """Raises UnavailableError where cuDNN's attention cannot take this."""
    require_cuda(device, dtype, head_dim, max_head_dim=128)
    if not torch.backends.cudnn.is_available():
        raise UnavailableError("this torch has no cuDNN")
    probe(partial(_plan_cudnn, (SDPBackend.CUDNN_ATTENTION,)), device, dtype, head_dim)
    return partial(_plan_cudnn, CUDNN_FIRST)


def plan_sdpa(layout: Layout) -> Attend:
    """Plan `SdpaAttend`."""
    return SdpaAttend(layout.runs)


def _plan_cudnn(kernels: tuple[SDPBackend, ...], layout: Layout) -> Attend:
    return CudnnAttend(layout.runs, kernels)


def _written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two matrix products: for training on a CPU.

    The fused kernel's backward took a fifth of a training step of the demo model (16 to 64 image
    tokens, one thread); this one takes a third of that.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    out: Tensor = scores.float().softmax(-1).to(value.dtype) @ value
    return out
