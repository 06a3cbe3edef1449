"""Second-order solver with two network evaluations per interval.

The official inference script of Lumina-Image 2.0 integrates with it (torchdiffeq's fixed-grid
`midpoint`): a trial step to the middle of the interval, then the whole interval with the velocity
found there. "Middle" is the mean of the interval's two sigmas, after the shift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.samplers.base import Sampler, SamplerState

if TYPE_CHECKING:
    from torch import Tensor


class MidpointSampler(Sampler):
    """Even evaluations at the left end of an interval, odd ones at its half point.

    At the half point `SamplerState.memory` holds the trial latents, and `SamplerState.latents`
    still those of the left end.
    """

    @property
    def num_evaluations(self) -> int:
        """Two per interval of the schedule."""
        return 2 * self.num_intervals

    def interval_of(self, evaluation: int) -> int:
        """Both evaluations of a pair belong to one interval."""
        return evaluation // 2

    def sigma_at(self, evaluation: int) -> float:
        """The left (noisier) end of the interval, or its middle."""
        if evaluation % 2 == 0:
            return self.sigmas[evaluation // 2]
        left, right = self._ends(evaluation)
        return 0.5 * (left + right)

    def evaluation_point(self, state: SamplerState) -> Tensor:
        """The state itself, or the trial step to the half point."""
        return state.latents if state.memory is None else state.memory

    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """Go to the half point on trial, or with its velocity over the whole interval."""
        left, right = self._ends(state.evaluation)
        motion = (left - right) * velocity.to(state.latents.dtype)
        after = state.evaluation + 1
        if state.memory is None:
            trial = state.latents + 0.5 * motion
            return SamplerState(latents=state.latents, evaluation=after, memory=trial)
        return SamplerState(latents=state.latents + motion, evaluation=after)

    def predicted(self, before: SamplerState, after: SamplerState) -> Tensor:
        """Clean latents as the newest velocity foresees them, from the left end of the interval."""
        left, right = self._ends(before.evaluation)
        if after.memory is None:
            moved, width = after.latents - before.latents, left - right
        else:  # the trial step covers half of the interval
            moved, width = after.memory - before.latents, 0.5 * (left - right)
        return before.latents + left / width * moved

    def _ends(self, evaluation: int) -> tuple[float, float]:
        interval = self.interval_of(evaluation)
        return self.sigmas[interval], self.sigmas[interval + 1]
