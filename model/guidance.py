"""Classifier-free guidance: when it acts, how the branches combine, how the result is rescaled.

Both dialects of Lumina-Image 2.0 are here, because they give different pictures:

- truncation: diffusers counts intervals (`cfg_trunc_ratio`), the official code looks at the
  timestep of each evaluation (`cfg_trunc_t`), also at a half point. Either way guidance acts on the
  early, noisy side, and afterwards only the conditional branch runs.
- renormalisation: diffusers always rescales each row (last axis) to the norm of the conditional
  velocity (`row`); the official code shrinks the whole sample, never grows it (`global`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """The guidance settings of one request.

    Attributes:
        guidance_scale: weight w of ``uncond + w * (cond - uncond)``; 1 or less means off.
        cfg_trunc_ratio: guided while ``(interval + 1) / num_intervals <= ratio``; None = no such
            limit.
        cfg_trunc_t: guided while ``timestep < cfg_trunc_t``; None = no such limit.
        cfg_renorm: `none`, `global` or `row`.
        cfg_renorm_scale: the official rho, used by `global` only; 0 switches it off.
    """

    guidance_scale: float
    cfg_trunc_ratio: float | None = None
    cfg_trunc_t: float | None = None
    cfg_renorm: str = "row"
    cfg_renorm_scale: float = 1.0

    def is_guided(self, interval: int, num_intervals: int, timestep: float) -> bool:
        """Whether an evaluation needs both branches.

        Args:
            interval: of the schedule, from 0, that the evaluation helps to cross.
            num_intervals: of the schedule.
            timestep: what the network receives in this evaluation (0 = noise).
        """
        if self.guidance_scale <= 1.0:
            return False
        passed = (interval + 1) / num_intervals
        if self.cfg_trunc_ratio is not None and passed > self.cfg_trunc_ratio:
            return False
        return self.cfg_trunc_t is None or timestep < self.cfg_trunc_t

    def combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Guided velocity of one sample; all [C, H, W], computed in float32."""
        cond, uncond = cond.float(), uncond.float()
        guided = uncond + self.guidance_scale * (cond - uncond)
        if self.cfg_renorm == "row":
            return renorm_row(guided, cond)
        if self.cfg_renorm == "global":
            return renorm_global(guided, cond, self.cfg_renorm_scale)
        assert self.cfg_renorm == "none", self.cfg_renorm
        return guided


def renorm_row(guided: Tensor, cond: Tensor) -> Tensor:
    """Rescale each row (last axis) of `guided` to the norm of the same row of `cond`; [C, H, W]."""
    norm: Tensor = torch.linalg.vector_norm(guided, dim=-1, keepdim=True)
    target: Tensor = torch.linalg.vector_norm(cond, dim=-1, keepdim=True)
    # A row of exact zeros (a network fresh from zero initialisation) stays zero instead of 0/0.
    return guided * (target / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def renorm_global(guided: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Shrink `guided` [C, H, W] so that its norm is at most `scale` times that of `cond`.

    The norm is taken over the whole sample; nothing is ever enlarged; `scale` 0 does nothing.
    """
    if scale <= 0.0:
        return guided
    norm: Tensor = torch.linalg.vector_norm(guided)
    ceiling: Tensor = scale * torch.linalg.vector_norm(cond)
    factor = (ceiling / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
    return guided * factor
