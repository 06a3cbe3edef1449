"""The flow-matching objective of one packed batch, with the auxiliary low-resolution loss.

Lumina-Image 2.0 (arXiv 2503.21758) and its released training code: the velocity error on the
latents, and at 1024 px the same error on the clean latents pooled 4x, with noise and timesteps of
their own and the same captions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import flow
from trainer.loss import sample_timesteps, velocity_loss

POOL = 4
Network = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Noised:
    """Clean latents with the noise and the timesteps they are met at."""

    clean: list[Tensor]  # [C, h_i, w_i] fp32
    noise: list[Tensor]
    timesteps: Tensor  # [n]

    @classmethod
    def draw(
        cls, clean: Sequence[Tensor], shift: float, generators: Sequence[torch.Generator]
    ) -> "Noised":
        """Noise and a timestep for every sample, from a generator of its own each."""
        drawn = [
            (sample_timesteps(1, shift, generator), torch.randn(x.shape, generator=generator))
            for x, generator in zip(clean, generators, strict=True)
        ]
        return cls(list(clean), [noise for _, noise in drawn], torch.cat([t for t, _ in drawn]))

    @property
    def noisy(self) -> list[Tensor]:
        """What the network sees."""
        return [
            flow.interpolate(data, noise, t)
            for data, noise, t in zip(self.clean, self.noise, self.timesteps, strict=True)
        ]

    @property
    def targets(self) -> list[Tensor]:
        """What it should say."""
        return [flow.velocity_target(*p) for p in zip(self.clean, self.noise, strict=True)]


def pooled(latents: Sequence[Tensor]) -> list[Tensor]:
    """Clean latents of a quarter of the side: means of 4 x 4."""
    return [F.avg_pool2d(x, POOL) for x in latents]


def velocity_errors(
    network: Network, noised: Noised, prompts: Sequence[Tensor], auxiliary: Noised | None = None
) -> tuple[Tensor, Tensor | None]:
    """Mean squared velocity error of every sample, ``[n]``, and of its pooled version.

    Both go through the network in one packed forward.

    Args:
        network: a Next-DiT.
        noised: the samples.
        prompts: features ``[L_i, D]`` of each.
        auxiliary: the pooled samples, in the same order; None: without.
    """
    parts = [noised] if auxiliary is None else [noised, auxiliary]
    noisy = [x for part in parts for x in part.noisy]
    timesteps = torch.cat([part.timesteps for part in parts])
    velocity = network(noisy, timesteps, list(prompts) * len(parts))
    targets = [x.to(velocity[0].device) for part in parts for x in part.targets]
    errors = velocity_loss(velocity, targets)
    count = len(noised.clean)
    return errors[:count], None if auxiliary is None else errors[count:]
