"""What recorded runs say about skipping the joint blocks: a polynomial and the best schedules.

Shapes: N = evaluations of a run, T = image tokens of a picture, d = width of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from model import GenerationRequest
from model.pipeline import DenoiseState, Pipeline
from model.teacache import RequestCache, TeaCacheState, relative_change

DEGREE = 4


class Watch:
    """A cache policy that computes every step and keeps all there is to look at."""

    def needs_signal(self, step: int) -> bool:
        """Always."""
        return True

    def keeps_residual(self, step: int) -> bool:
        """Always."""
        return True

    def decide(self, state: TeaCacheState, step: int, change: float | None) -> TeaCacheState:
        """The state with a computed step added."""
        return replace(state, decisions=state.decisions + "1")


@dataclass
class Recorded:
    """Runs of several prompts with the same solver, nothing skipped.

    Attributes:
        input_changes: relative L1 change of the modulated joint input between adjacent steps.
        output_changes: the same of the residual of the joint blocks, in the same order.
        costs: [N, N]; entry (i, j), i < j, is how far the latents go astray if step j reuses the
            residual of step i, in the mean over prompts.
    """

    input_changes: list[float] = field(default_factory=list)
    output_changes: list[float] = field(default_factory=list)
    costs: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


@torch.inference_mode()
def record(pipeline: Pipeline, requests: Sequence[GenerationRequest]) -> Recorded:
    """Draw pictures of one solver and schedule, all steps computed, and look on."""
    states = [pipeline.prepare(request) for request in requests]
    recorded = Recorded()
    residuals: list[list[dict[str, Tensor]]] = [[] for _ in states]
    for state in states:
        state.cache = RequestCache(Watch())
    while not states[0].finished:
        before = [dict(_cache(state).states) for state in states]
        pipeline.denoise_step(states)
        for state, earlier, kept in zip(states, before, residuals, strict=True):
            kept.append(_look(recorded, state, earlier))
    costs = [_costs(state, kept) for state, kept in zip(states, residuals, strict=True)]
    recorded.costs = np.mean(costs, axis=0)
    return recorded


def _cache(state: DenoiseState) -> RequestCache:
    assert state.cache is not None
    return state.cache


def _look(
    recorded: Recorded, state: DenoiseState, earlier: dict[tuple[int, str], TeaCacheState]
) -> dict[str, Tensor]:
    """Note the changes of a step; returns the residuals of the image tokens by branch."""
    residuals = {}
    for branch, now in _cache(state).states.items():
        if now.signal is None or now.residual is None:  # a branch that guidance has left
            continue
        then = earlier.get(branch)
        if then is not None and then.signal is not None and then.residual is not None:
            recorded.input_changes.append(float(relative_change(now.signal, then.signal)))
            recorded.output_changes.append(float(relative_change(now.residual, then.residual)))
        residuals[branch[1]] = now.residual[-state.tokens_per_image :].float()
    return residuals


def _costs(state: DenoiseState, residuals: Sequence[dict[str, Tensor]]) -> np.ndarray:
    """Mean absolute error of the guided residual times the length of the interval, [N, N]."""
    count, sampler = len(residuals), state.sampler
    costs = np.zeros((count, count))
    for j, now in enumerate(residuals):
        interval = sampler.interval_of(j)
        width = sampler.sigmas[interval] - sampler.sigmas[interval + 1]
        for i in range(j):
            change = {branch: residuals[i][branch] - value for branch, value in now.items()}
            error = change["cond"]
            if "uncond" in change:
                weight = state.guidance.guidance_scale
                error = change["uncond"] + weight * (change["cond"] - change["uncond"])
            costs[i, j] = width * float(error.abs().mean())
    return costs


def fit_polynomial(inputs: Sequence[float], outputs: Sequence[float]) -> tuple[list[float], float]:
    """Least squares of degree 4, output change by input change.

    Returns:
        Coefficients, highest power first, and the share of the variance they explain.

    Raises:
        ValueError: fewer different input changes than coefficients.
    """
    x, y = np.asarray(inputs, np.float64), np.asarray(outputs, np.float64)
    usable = np.isfinite(x) & np.isfinite(y)
    x, y = x[usable], y[usable]
    different = len(np.unique(x))
    if different <= DEGREE:
        raise ValueError(
            f"{different} recorded changes are too few for a polynomial of degree {DEGREE}: the "
            "checkpoint's default num_inference_steps must be larger"
        )
    scale = x.max()  # powers of small numbers would make the system ill-conditioned
    scaled, *_ = np.linalg.lstsq(np.vander(x / scale, DEGREE + 1), y, rcond=None)
    coefficients = scaled / scale ** np.arange(DEGREE, -1, -1)
    left = float(np.var(y - np.polyval(coefficients, x)))
    explained = 1.0 - left / float(np.var(y)) if np.var(y) > 0 else 1.0
    return [float(f"{value:.8g}") for value in coefficients], explained


def best_schedule(costs: np.ndarray, num_computed: int) -> tuple[bool, ...]:
    """The schedule with so many computed steps that goes least astray; first and last compute.

    Dynamic programming over the computed steps: what lies between two of them reuses the first.

    Args:
        costs: [N, N] of `Recorded`.
        num_computed: clamped to what N steps allow.
    """
    count = len(costs)
    num_computed = min(max(num_computed, min(2, count)), count)
    # reuse[i, k]: steps i+1 .. k-1 take the residual of step i.
    reuse = np.full((count, count), math.inf)
    for i in range(count):
        for k in range(i + 1, count):
            reuse[i, k] = costs[i, i + 1 : k].sum()
    best = np.full((num_computed, count), math.inf)
    came = np.zeros((num_computed, count), dtype=int)
    best[0, 0] = 0.0
    for used in range(1, num_computed):
        total = best[used - 1][:, None] + reuse
        came[used], best[used] = total.argmin(axis=0), total.min(axis=0)
    computed, step = [False] * count, count - 1
    for used in range(num_computed - 1, -1, -1):
        computed[step] = True
        step = came[used, step]
    return tuple(computed)
