"""The flow-matching convention, and the only conversion between sigma and timestep.

- sigma: noise fraction, 1 = pure noise, 0 = data. Schedules and samplers speak sigma.
- timestep: what the network receives, 0 = pure noise, 1 = data. No factor 1000 anywhere.
- path: ``x_t = t * data + (1 - t) * noise``; velocity: ``d x_t / d t = data - noise``.

A step of the sampler therefore reads ``latents += (sigma - sigma_next) * velocity``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    Level = TypeVar("Level", float, Tensor)


def timestep_from_sigma(sigma: Level) -> Level:
    """Timestep in [0, 1] (0 = noise) of a noise fraction; a float or a tensor of any shape."""
    return 1.0 - sigma


def sigma_from_timestep(timestep: Level) -> Level:
    """Noise fraction in [0, 1] (1 = noise) of a timestep; a float or a tensor of any shape."""
    return 1.0 - timestep


def interpolate(data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Point on the path between noise and data.

    Args:
        data: clean latents, [C, H, W] or [n, C, H, W].
        noise: standard normal, same shape as `data`.
        timesteps: scalar tensor, or [n] for batched data.

    Returns:
        ``t * data + (1 - t) * noise``, same shape as `data`.
    """
    t = timesteps.reshape(*timesteps.shape, *[1] * (data.dim() - timesteps.dim()))
    return t * data + (1.0 - t) * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    """What the network is trained to predict: ``data - noise``, at every timestep."""
    return data - noise
