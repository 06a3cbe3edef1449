import math

import numpy as np
import pytest

from trainer.evaluate.similarity import psnr, ssim


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 200, (32, 48, 3), dtype=np.uint8)


def test_equal_pictures():
    assert psnr(picture(), picture()) == math.inf
    assert ssim(picture(), picture()) == pytest.approx(1.0)


def test_psnr_of_a_known_difference():
    assert psnr(picture(), picture() + 10) == pytest.approx(20 * math.log10(255 / 10))


def test_ssim_of_flat_pictures_is_the_luminance_term():
    one, other = (np.full((20, 20, 3), value, np.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(one, other) == pytest.approx(expected)


def test_ssim_of_independent_noise_is_near_zero():
    assert abs(ssim(picture(0), picture(1))) < 0.1


def test_ssim_equals_the_definition_window_by_window():
    rng = np.random.default_rng(3)
    x = picture(3)[:13, :12, :1].astype(np.float64)
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).round()
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for row in range(3):
        for column in range(2):
            a = x[row : row + 11, column : column + 11, 0]
            b = y[row : row + 11, column : column + 11, 0]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    assert ssim(x, y) == pytest.approx(np.mean(values))
