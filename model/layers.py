"""Building blocks of the Next-DiT on packed tokens.

Shapes: T = tokens of all sequences, n = sequences, d = width, e = modulation width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gate_residual_norm import gate_residual, gate_residual_norm
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rms_norm import rms_norm, weight_by_row
from kernels.silu_mul import silu_mul
from model.adapters import UNADAPTED, Adapted, Linear, Spans
from model.attention import Attend
from model.config import FREQUENCY_DIM, NextDiTConfig

QK_NORM_EPS = 1e-5  # fixed, whatever norm_eps says: diffusers and the released weights agree on it
FINAL_NORM_EPS = 1e-6

# Norm weights of a modulated block by timestep, [n, 2d] each: two with scales folded in, two with
# gates.
Folded = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """RMSNorm with weight; a call may pass other weights in its place."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, x: Tensor, weight: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """``[..., dim]`` to ``[..., dim]``; ``weight`` likewise, or rows ``[n, dim]`` by index."""
        return rms_norm(x, self.weight if weight is None else weight, self.eps, index)


class Attention(nn.Module):
    """Bias-free grouped-query attention with QK-norm and rotary positions."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        kv_dim = self.kv_heads * self.head_dim
        self.qkv = Linear(config.hidden_size, config.hidden_size + 2 * kv_dim, bias=False)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, QK_NORM_EPS)
        self.k_norm = RMSNorm(self.head_dim, QK_NORM_EPS)

    def forward(
        self, x: Tensor, attend: Attend, cos: Tensor, sin: Tensor, spans: Spans = ()
    ) -> Tensor:
        """``[T, d]`` to ``[T, d]``; ``attend`` is the plan of an attention backend."""
        qkv = self.qkv(x, spans).view(x.shape[0], -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, QK_NORM_EPS)
        out: Tensor = self.out(attend(q, k, v).flatten(1), spans)
        return out


class FeedForward(nn.Module):
    """SwiGLU: ``W2(SiLU(W1 x) * W3 x)``, with W1 and W3 fused."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.ffn_dim, bias=False)
        self.down = Linear(config.ffn_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, spans: Spans = ()) -> Tensor:
        """``[T, d]`` to ``[T, d]``."""
        out: Tensor = self.down(silu_mul(self.gate_up(x, spans)), spans)
        return out


class Block(nn.Module):
    """Sandwich-normalised transformer block; modulated by the timestep unless it refines text."""

    def __init__(self, config: NextDiTConfig, *, modulated: bool) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.norm_eps
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(d, eps)
        self.attention_norm2 = RMSNorm(d, eps)
        self.ffn_norm1 = RMSNorm(d, eps)
        self.ffn_norm2 = RMSNorm(d, eps)
        self.modulation = Linear(config.modulation_dim, 4 * d) if modulated else None

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        cos: Tensor,
        sin: Tensor,
        time_embedding: Tensor | None = None,
        sequence_index: Tensor | None = None,
        folded: Folded | None = None,
        adapted: Adapted = UNADAPTED,
    ) -> Tensor:
        """``[T, d]`` to ``[T, d]``.

        Args:
            x: the residual stream, in the dtype of the weights or a wider one, which it keeps.
            attend: attention inside the sequences of the T tokens.
            cos: ``[T, head_dim / 2]`` fp32.
            sin: ``[T, head_dim / 2]`` fp32.
            time_embedding: ``[n, e]`` after SiLU; modulated blocks only.
            sequence_index: ``[T]``, the row of each token's time embedding or folded weights.
            folded: what :meth:`fold` made of the time embedding, where it is known.
            adapted: LoRAs of the T tokens and n sequences.
        """
        if self.modulation is None:
            norms = self.attention_norm1, self.ffn_norm1, self.attention_norm2, self.ffn_norm2
            weights: tuple[Tensor, ...] = tuple(norm.weight for norm in norms)
        else:
            assert sequence_index is not None
            if folded is None:
                assert time_embedding is not None
                folded = self.fold(time_embedding, x.dtype, adapted.sequences)
            weights = tuple(part for rows in folded for part in rows.chunk(2, dim=-1))
        scale_1, scale_2, gate_1, gate_2 = weights
        spans, eps, index = adapted.tokens, self.attention_norm2.eps, sequence_index
        normed = self.attention_norm1(x, scale_1, index)
        attended = self.attention(normed, attend, cos, sin, spans)
        x, normed = gate_residual_norm(attended, x, gate_1, scale_2, eps, index)
        return gate_residual(self.feed_forward(normed, spans), x, gate_2, eps, index)

    def fold(self, time_embedding: Tensor, residual: torch.dtype, spans: Spans = ()) -> Folded:
        """Norm weights ``[n, 2d]`` with the scales and with the gates of ``[n, e]`` folded in.

        ``RMS(x) w (1 + s)`` and ``tanh(g) (RMS(x) w)`` are one multiplication per token this way.
        They are folded in fp32 and rounded once: to what the matrix products take, and for what is
        added to the residual stream to that stream's dtype, if it is the wider one.
        """
        assert self.modulation is not None
        modulation = self.modulation(time_embedding, spans).float()
        scale_1, gate_1, scale_2, gate_2 = modulation.chunk(4, dim=-1)
        own = self.attention_norm1.weight.dtype
        scaled = torch.cat(
            (self.attention_norm1.weight * (1 + scale_1), self.ffn_norm1.weight * (1 + scale_2)),
            dim=-1,
        )
        gated = torch.cat(
            (self.attention_norm2.weight * gate_1.tanh(), self.ffn_norm2.weight * gate_2.tanh()),
            dim=-1,
        )
        return scaled.to(own), gated.to(torch.promote_types(own, residual))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the raw timestep in [0, 1], cosine half first, then a two-layer MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = Linear(FREQUENCY_DIM, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, timesteps: Tensor, spans: Spans = ()) -> Tensor:
        """``[n]`` timesteps to ``[n, e]``."""
        half = FREQUENCY_DIM // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        sinusoid = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid, spans)), spans)
        return out


class CaptionEmbedder(nn.Module):
    """RMSNorm of the text features, then a projection to the model's width."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.cap_feat_dim, config.norm_eps)
        self.linear = Linear(config.cap_feat_dim, config.hidden_size)

    def forward(self, features: Tensor, spans: Spans = ()) -> Tensor:
        """``[T, cap_feat_dim]`` to ``[T, d]``."""
        out: Tensor = self.linear(self.norm(features), spans)
        return out


class FinalLayer(nn.Module):
    """LayerNorm without affine, scaled by the timestep (no shift), projected to patches."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.modulation = Linear(config.modulation_dim, config.hidden_size)
        self.linear = Linear(config.hidden_size, config.patch_dim)

    def scale(self, time_embedding: Tensor, spans: Spans = ()) -> Tensor:
        """Factors ``[n, d]`` of the normalised tokens, fp32, for ``[n, e]`` after SiLU."""
        scale: Tensor = 1 + self.modulation(time_embedding, spans).float()
        return scale

    def forward(
        self, x: Tensor, scale: Tensor, sequence_index: Tensor, spans: Spans = ()
    ) -> Tensor:
        """``[T, d]``, ``[n, d]`` of :meth:`scale` and ``[T]`` to ``[T, patch_dim]``."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=FINAL_NORM_EPS)
        scaled = normed * weight_by_row(scale, sequence_index)
        out: Tensor = self.linear(scaled.to(self.linear.weight.dtype), spans)
        return out
