"""First-order solver: one network evaluation per interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.samplers.base import Sampler, SamplerState

if TYPE_CHECKING:
    from torch import Tensor


class EulerSampler(Sampler):
    """``latents += (sigma - sigma_next) * velocity``."""

    @property
    def num_evaluations(self) -> int:
        """One per interval of the schedule."""
        return len(self.sigmas) - 1

    def sigma_at(self, evaluation: int) -> float:
        """The left (noisier) end of interval `evaluation`."""
        return self.sigmas[evaluation]

    def evaluation_point(self, state: SamplerState) -> Tensor:
        """The state itself."""
        return state.latents

    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """Advance over one interval, in the dtype of the state."""
        interval = self.sigmas[state.evaluation] - self.sigmas[state.evaluation + 1]
        latents = state.latents + interval * velocity.to(state.latents.dtype)
        return SamplerState(latents=latents, evaluation=state.evaluation + 1)
