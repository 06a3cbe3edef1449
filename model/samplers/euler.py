"""First-order solver: one network evaluation per interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.samplers.base import Sampler, SamplerState

if TYPE_CHECKING:
    from torch import Tensor


class EulerSampler(Sampler):
    """``latents += (sigma - sigma_next) * velocity``."""

    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """Advance over one interval, in the dtype of the state."""
        interval = self.sigmas[state.evaluation] - self.sigmas[state.evaluation + 1]
        latents = state.latents + interval * velocity.to(state.latents.dtype)
        return SamplerState(latents=latents, evaluation=state.evaluation + 1)
