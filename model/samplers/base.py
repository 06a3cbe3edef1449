"""What every solver looks like from outside: it names a point, and is fed the velocity there.

A solver object holds a request's schedule and never changes; what changes lives in a
`SamplerState`, one per image. So requests with different solvers, schedules and step counts can
share one forward: collect everybody's evaluation points, run the network once, hand back the
velocities. How many evaluations an interval takes, and what is remembered between them, is the
solver's own business; callers only count evaluations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class SamplerState:
    """Where one image stands.

    Attributes:
        latents: solver state [C, H, W], float32 whatever the network computes in.
        evaluation: index of the next network evaluation, from 0.
        memory: what the solver keeps from one evaluation to the next, [C, H, W], float32; None
            where it keeps nothing.
    """

    latents: Tensor
    evaluation: int = 0
    memory: Tensor | None = None


class Sampler(ABC):
    """A numerical solver of one request; immutable, `step` is pure."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        assert len(sigmas) >= 2, "a schedule has at least one interval"
        assert all(a > b for a, b in pairwise(sigmas)), "sigmas must descend"
        self.sigmas = tuple(sigmas)

    @property
    def num_intervals(self) -> int:
        """How many intervals the schedule has, from noise to data."""
        return len(self.sigmas) - 1

    @property
    def num_evaluations(self) -> int:
        """How many times the network is asked, from noise to data."""
        return self.num_intervals

    def interval_of(self, evaluation: int) -> int:
        """The interval (from 0) that evaluation number `evaluation` helps to cross."""
        return evaluation

    def sigma_at(self, evaluation: int) -> float:
        """Noise fraction at which evaluation number `evaluation` takes place."""
        return self.sigmas[evaluation]

    def evaluation_point(self, state: SamplerState) -> Tensor:
        """Latents [C, H, W] at which the network is to be asked next, at `sigma_at(...)`."""
        return state.latents

    @abstractmethod
    def step(self, state: SamplerState, velocity: Tensor) -> SamplerState:
        """New state after the network answered `velocity` (data - noise) at the asked point."""

    def predicted(self, before: SamplerState, after: SamplerState) -> Tensor:
        """Clean latents [C, H, W] that the evaluation between two states foresees.

        The way from `before` on, at the velocity of that evaluation, down to sigma 0.
        """
        sigma, sigma_next = (self.sigma_at(before.evaluation), self.sigmas[after.evaluation])
        way = sigma / (sigma - sigma_next)
        return before.latents + way * (after.latents - before.latents)

    def start(self, noise: Tensor) -> SamplerState:
        """State before the first evaluation; `noise` is standard normal [C, H, W], float32."""
        return SamplerState(latents=noise)
