"""Numerical solvers of the flow: which exist, and how one is made for a request.

Importing this package does not import torch: the solvers only do arithmetic on what they are given.
"""

from __future__ import annotations

from model.samplers.base import Sampler, SamplerState
from model.samplers.euler import EulerSampler
from model.samplers.sigmas import TIME_GRIDS, make_sigmas

__all__ = ["SAMPLERS", "TIME_GRIDS", "Sampler", "SamplerState", "make_sampler", "make_sigmas"]

SAMPLERS: dict[str, type[Sampler]] = {"euler": EulerSampler}


def make_sampler(name: str, *, time_grid: str, num_inference_steps: int, shift: float) -> Sampler:
    """Build the solver of one request.

    Args:
        name: a key of `SAMPLERS`.
        time_grid: a name of `TIME_GRIDS`.
        num_inference_steps: steps asked for, in the meaning of the time grid.
        shift: resolution shift of the schedule, > 0.

    Raises:
        ValueError: the grid does not allow this number of steps.
    """
    return SAMPLERS[name](make_sigmas(time_grid, num_inference_steps, shift))
