"""Numerical solvers of the flow: which exist, and how one is made for a request.

Importing this package does not import torch: the solvers only do arithmetic on what they are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.samplers.base import Sampler, SamplerState
from model.samplers.dpm import DpmSampler
from model.samplers.euler import EulerSampler
from model.samplers.midpoint import MidpointSampler
from model.samplers.sigmas import TIME_GRIDS, make_dpm_sigmas, make_sigmas

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "OWN_GRID",
    "SAMPLERS",
    "TIME_GRIDS",
    "Sampler",
    "SamplerState",
    "make_dpm_sigmas",
    "make_sampler",
    "make_sigmas",
]

SAMPLERS: dict[str, type[Sampler]] = {
    "euler": EulerSampler,
    "midpoint": MidpointSampler,
    "dpm": DpmSampler,
}
OWN_GRID = "dpm"  # the solver that brings its own grid: a time_grid has no meaning with it


def make_sampler(
    name: str,
    *,
    time_grid: str | None = None,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Sampler:
    """Build the solver of one request, on a schedule by name or on one of its own.

    Args:
        name: a key of `SAMPLERS`.
        time_grid: a name of `TIME_GRIDS`; not read for `OWN_GRID`.
        num_inference_steps: steps asked for, in the meaning of the time grid.
        shift: resolution shift of the schedule, > 0.
        sigmas: descending noise fractions above 0, as they are (no shift); the last interval ends
            at 0. Where given, the three settings above are not read.

    Raises:
        ValueError: the grid does not allow this number of steps.
    """
    if sigmas is not None:
        return SAMPLERS[name]((*sigmas, 0.0))
    assert num_inference_steps is not None
    assert shift is not None
    if name == OWN_GRID:
        return SAMPLERS[name](make_dpm_sigmas(num_inference_steps, shift))
    assert time_grid is not None
    return SAMPLERS[name](make_sigmas(time_grid, num_inference_steps, shift))
