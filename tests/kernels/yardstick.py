"""How far a result is from its float64 reference."""

import torch
from torch import Tensor

# (tokens, features): odd sizes, one token, none at all, and sizes no power of two divides.
AWKWARD_SHAPES = [(5, 10), (7, 123), (33, 96), (1, 96), (1, 1), (0, 96)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers as every other row of a wider tensor, as a slice of a fused one lies."""
    wide = torch.full((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3), float("nan"))
    view = wide.to(x.dtype)[::2, ..., : x.shape[-1]]
    view.copy_(x)
    assert not view.is_contiguous()
    return view


def error(result: Tensor, reference: Tensor) -> float:
    """Relative L2 distance from a float64 reference."""
    assert reference.dtype == torch.float64
    return float((result.double() - reference).norm() / reference.norm())
