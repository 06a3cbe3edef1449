"""Sigma schedules: how the way from noise (1) to data (0) is cut into intervals.

Two grids for the one-step solvers, both uniform before the resolution shift. They differ in what a
step count means:

- `diffusers`: N steps are N intervals, sigmas ``linspace(1, 1/N, N)`` shifted, then 0;
- `official` (Alpha-VLLM): N steps are N grid points, ``linspace(1, 0, N)`` shifted, hence N - 1
  intervals.

Flow-DPM-Solver has a grid of its own, because its log signal-to-noise ratio must be finite at the
start: it begins a thousandth below pure noise.
"""

from __future__ import annotations

TIME_GRIDS = ("diffusers", "official")
DPM_START = 0.999  # sigma of the first evaluation before the shift


def shift_sigma(sigma: float, shift: float) -> float:
    """Move a noise fraction toward noise: ``s * sigma / (1 + (s - 1) * sigma)``; fixes 0 and 1."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def make_sigmas(time_grid: str, num_inference_steps: int, shift: float) -> tuple[float, ...]:
    """Descending noise fractions from 1.0 to exactly 0.0, one more than there are intervals.

    Args:
        time_grid: a name of `TIME_GRIDS`.
        num_inference_steps: intervals for `diffusers`, grid points for `official`.
        shift: resolution shift > 0; 1 leaves the grid uniform, Lumina-Image 2.0 uses 6.

    Raises:
        ValueError: fewer steps than the grid can express.
    """
    assert time_grid in TIME_GRIDS, time_grid
    intervals = num_inference_steps if time_grid == "diffusers" else num_inference_steps - 1
    if intervals < 1:
        least = num_inference_steps + 1 - intervals
        raise ValueError(
            f"num_inference_steps {num_inference_steps} is not allowed with time_grid "
            f"{time_grid!r}: give {least} or more"
        )
    return _shifted(1.0, intervals, shift)


def make_dpm_sigmas(num_inference_steps: int, shift: float) -> tuple[float, ...]:
    """The grid of Flow-DPM-Solver: as many intervals as steps, from just below 1 to exactly 0.

    Args:
        num_inference_steps: intervals, each with one network evaluation.
        shift: resolution shift > 0.
    """
    return _shifted(DPM_START, num_inference_steps, shift)


def _shifted(start: float, intervals: int, shift: float) -> tuple[float, ...]:
    uniform = [start * (1.0 - i / intervals) for i in range(intervals)]
    return (*(shift_sigma(sigma, shift) for sigma in uniform), 0.0)
