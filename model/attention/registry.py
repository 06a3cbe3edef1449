"""Which attention backend is used: chosen once for a device, dtype and head size, and logged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch

from model.attention.dense import open_cudnn, open_sdpa
from model.attention.plan import Plan, UnavailableError
from model.attention.ragged import open_varlen, open_xformers

log = logging.getLogger(__name__)

VARIABLE = "LUMINA_ATTENTION"

_Open = Callable[[torch.device, torch.dtype, int], Plan]

# In the order of preference: the ragged ones make one call per block.
BACKENDS: dict[str, _Open] = {
    "varlen": open_varlen,
    "xformers": open_xformers,
    "cudnn": open_cudnn,
    "sdpa": open_sdpa,
}
LENGTHS_ON_DEVICE = ("varlen",)


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention backend that works.

    Attributes:
        name: of `BACKENDS`.
        plan: makes, for a layout, what attends inside its sequences.
    """

    name: str
    plan: Plan

    @property
    def lengths_on_device(self) -> bool:
        """Whether its kernel reads lengths from the layout's `cu_seqlens` alone, as a graph must.

        Of the host's numbers it then uses the largest length only, as a bound.
        """
        return self.name in LENGTHS_ON_DEVICE


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend for queries, keys and values of this kind; the environment may force it.

    Raises:
        ValueError: one sentence, when `LUMINA_ATTENTION` names none, or one that cannot be used.
    """
    return _choose(device, dtype, head_dim, os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=64)
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int, forced: str) -> Backend:
    backend = (
        _forced(forced, device, dtype, head_dim) if forced else _first(device, dtype, head_dim)
    )
    log.info("attention: %s for %s on %s", backend.name, dtype, device)
    return backend


def _first(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    for name in BACKENDS:
        try:
            return Backend(name, BACKENDS[name](device, dtype, head_dim))
        except UnavailableError as error:
            log.debug("attention: not %s, %s", name, error)
    raise AssertionError("sdpa takes everything")


def _forced(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    if name in BACKENDS:
        with suppress(UnavailableError):
            return Backend(name, BACKENDS[name](device, dtype, head_dim))
    available = available_backends(device, dtype, head_dim)
    works = ", ".join(n for n, each in available.items() if isinstance(each, Backend))
    reasons = "; ".join(f"{n}: {each}" for n, each in available.items() if isinstance(each, str))
    raise ValueError(
        f"{VARIABLE} {name!r} is not allowed here: give {works}"
        + (f" (not available: {reasons})" if reasons else "")
    )


def available_backends(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> dict[str, Backend | str]:
    """Every backend by name, or in its place the reason why it cannot be used."""
    found: dict[str, Backend | str] = {}
    for name, open_backend in BACKENDS.items():
        try:
            found[name] = Backend(name, open_backend(device, dtype, head_dim))
        except UnavailableError as error:
            found[name] = str(error)
    return found
