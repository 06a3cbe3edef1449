"""Attention over packed sequences: full and bidirectional inside each, none across."""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import Layout, Run


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Softmax attention inside every sequence of ``layout``.

    Grouped queries: key/value head j serves query heads ``j*r .. j*r + r - 1``. The r query heads
    of one group are stacked along the query length, so keys and values are never repeated.

    Args:
        q: ``[T, heads, head_dim]``.
        k: ``[T, kv_heads, head_dim]``.
        v: ``[T, kv_heads, head_dim]``.
        layout: of the T tokens.

    Returns:
        ``[T, heads, head_dim]``.
    """
    outputs = [_run_attention(q, k, v, run) for run in layout.runs]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, run: Run) -> Tensor:
    heads, head_dim = q.shape[1:]
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    tokens = slice(run.start, run.stop)
    query = q[tokens].view(run.count, run.length, kv_heads, groups, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(run.count, kv_heads, -1, head_dim)
    key = k[tokens].view(run.count, run.length, kv_heads, head_dim).transpose(1, 2)
    value = v[tokens].view(run.count, run.length, kv_heads, head_dim).transpose(1, 2)
    if q.requires_grad and not q.is_cuda:
        out = _written_out(query, key, value)
    else:
        out = F.scaled_dot_product_attention(query, key, value)
    out = out.view(run.count, kv_heads, groups, run.length, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)


def _written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as two matrix products: for training on a CPU.

    The fused kernel's backward took a fifth of a training step of the demo model (16 to 64 image
    tokens, one thread); this one takes a third of that.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    out: Tensor = scores.float().softmax(-1).to(value.dtype) @ value
    return out
