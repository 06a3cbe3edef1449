"""Flow-DPM-Solver: DPM-Solver++ (2M) for flow matching, one network evaluation per interval.

The solver of the official code of Lumina-Image 2.0 (`solver dpm`), after Lu et al.,
arXiv 2211.01095, algorithm 2, with ``alpha = 1 - sigma``. It is second order because it remembers
the data prediction of the evaluation before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from model.samplers.base import Sampler, SamplerState

if TYPE_CHECKING:
    from torch import Tensor


class DpmSampler(Sampler):
    """Multistep solver on predicted data; `SamplerState.memory` is the prediction before.

    The first step has no earlier prediction and is first order, that is an Euler step. So is the
    last: at sigma 0 the log signal-to-noise ratio is infinite, and so would be the second-order
    term.
    """

    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """Advance over one interval, in the dtype of the state."""
        i = state.evaluation
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        data = state.latents + sigma * velocity.to(state.latents.dtype)
        direction = data
        if state.memory is not None and i < self.num_intervals - 1:
            direction = data + self._extrapolation(i) * (data - state.memory)
        keep = sigma_next / sigma
        latents = keep * state.latents + (1.0 - keep) * direction
        return SamplerState(latents=latents, evaluation=i + 1, memory=data)

    def predicted(self, before: SamplerState, after: SamplerState) -> Tensor:
        """Clean latents as the newest evaluation foresees them: the solver remembers them."""
        assert after.memory is not None
        return after.memory

    def _extrapolation(self, i: int) -> float:
        """``1 / (2 r)``: half the ratio of this step to the one before, in log SNR."""
        before = _log_snr(self.sigmas[i]) - _log_snr(self.sigmas[i - 1])
        now = _log_snr(self.sigmas[i + 1]) - _log_snr(self.sigmas[i])
        return now / (2.0 * before)  # 0 after pure noise, from where every step is infinitely long


def _log_snr(sigma: float) -> float:
    """``log((1 - sigma) / sigma)``; minus infinity at pure noise."""
    return math.log((1.0 - sigma) / sigma) if sigma < 1.0 else -math.inf
