"""How alike two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np

_WINDOW_SIGMA = 1.5
_WINDOW_RADIUS = 5  # 11 taps, as in the paper
_K1, _K2 = 0.01, 0.03


def psnr(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite when equal."""
    error = float(np.mean((picture.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0.0 else 10.0 * math.log10(255.0**2 / error)


def ssim(picture: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], 1 when equal.

    Wang et al. 2004: an 11x11 Gaussian window (sigma 1.5) where it fits, mean over channels.
    """
    x, y = picture.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * 255.0) ** 2, (_K2 * 255.0) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float(np.mean(top / bottom))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Gaussian means of every window that lies inside [H, W, C]."""
    taps = np.exp(-0.5 * (np.arange(-_WINDOW_RADIUS, _WINDOW_RADIUS + 1) / _WINDOW_SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(x, len(taps), axis=axis)
        x = windows @ taps
    return x
