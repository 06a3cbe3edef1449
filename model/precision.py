"""The arithmetic a pipeline computes in, by name (docs/numerics.md has what each costs).

Whatever the name: solver state, timesteps, sinusoids, rotary factors, norm statistics, softmax and
guidance are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """Dtypes of one way to compute.

    Attributes:
        weights: of network, text encoder and VAE, and of all matrix products.
        residual: of the stream that runs through the joint blocks.
    """

    weights: torch.dtype
    residual: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "mixed": Precision(torch.bfloat16, torch.float32),
}


def precision_named(name: str) -> Precision:
    """Look a precision up.

    Raises:
        ValueError: one sentence with the names there are.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not allowed: give {' or '.join(PRECISIONS)}")
    return PRECISIONS[name]


def precision_name(weights: torch.dtype, residual: torch.dtype) -> str:
    """The name of these dtypes, or for others torch's own name of the weights' dtype."""
    for name, precision in PRECISIONS.items():
        if (precision.weights, precision.residual) == (weights, residual):
            return name
    return str(weights).removeprefix("torch.")


def default_precision(device: torch.device | str) -> str:
    """What serves best on a device (docs/adr/0008-numerics.md)."""
    return "mixed" if torch.device(device).type == "cuda" else "fp32"
