"""Pixels of a scene: anti-aliased shapes from signed distances, on plain or patterned grounds.

Shapes are filled, upright and never rotated. Each shape is a signed distance in units of its
radius; a pixel's coverage falls linearly over the one pixel around the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.demo.layout import REACH
from trainer.demo.scenes import (
    BACKGROUND_COLORS,
    CHECKERED,
    GRADIENT,
    OBJECT_COLORS,
    PLAIN,
    Background,
    Scene,
)

Floats = NDArray[np.float32]
Image = NDArray[np.uint8]

# Proportions in radii, set so that all shapes look equally large.
SQUARE_HALF = 0.88
DIAMOND_HALF = 1.12
CROSS_ARM = 0.36
CROSS_REACH = 1.0
STAR_OUTER, STAR_INNER = 1.12, 0.47
TRIANGLE_TOP, TRIANGLE_BOTTOM, TRIANGLE_HALF = -1.05, 0.80, 1.06


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - np.float32(1.0)


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(SQUARE_HALF)


def _diamond(x: Floats, y: Floats) -> Floats:
    return (np.abs(x) + np.abs(y) - np.float32(DIAMOND_HALF)) * np.float32(math.sqrt(0.5))


def _cross(x: Floats, y: Floats) -> Floats:
    along, across = np.abs(x), np.abs(y)
    distance: Floats = np.maximum(
        np.maximum(along, across) - np.float32(CROSS_REACH),
        np.minimum(along, across) - np.float32(CROSS_ARM),
    )
    return distance


def _triangle(x: Floats, y: Floats) -> Floats:
    height = TRIANGLE_BOTTOM - TRIANGLE_TOP
    slant = math.hypot(height, TRIANGLE_HALF)
    side = (
        np.abs(x) * np.float32(height) - (y - np.float32(TRIANGLE_TOP)) * np.float32(TRIANGLE_HALF)
    ) / np.float32(slant)
    distance: Floats = np.maximum(side, y - np.float32(TRIANGLE_BOTTOM))
    return distance


def _star(x: Floats, y: Floats) -> Floats:
    """Fold the plane into one tenth of the star and measure to that tenth's edge."""
    wedge = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + wedge) % (2 * wedge) - wedge)
    length = np.hypot(x, y)
    inner_x, inner_y = STAR_INNER * math.cos(wedge), STAR_INNER * math.sin(wedge)
    normal = math.hypot(inner_y, STAR_OUTER - inner_x)
    normal_x, normal_y = inner_y / normal, (STAR_OUTER - inner_x) / normal
    folded = length * (np.cos(angle) * normal_x + np.sin(angle) * normal_y)
    return (folded - STAR_OUTER * normal_x).astype(np.float32)


DISTANCES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "diamond": _diamond,
    "cross": _cross,
}


def coverage(
    shape: str, center_x: float, center_y: float, radius: float, xs: slice, ys: slice
) -> Floats:
    """Share of each pixel that the shape covers, float32 [rows, columns] in [0, 1].

    Centre and radius are in pixels; `xs` and `ys` say which columns and rows to compute.
    """
    x = (np.arange(xs.start, xs.stop, dtype=np.float32) + np.float32(0.5 - center_x)) / radius
    y = (np.arange(ys.start, ys.stop, dtype=np.float32) + np.float32(0.5 - center_y)) / radius
    distance = DISTANCES[shape](x[None, :], y[:, None])
    covered: Floats = np.clip(np.float32(0.5) - distance * np.float32(radius), 0.0, 1.0)
    return covered


def render(scene: Scene, width: int, height: int) -> Image:
    """Render a scene: uint8 RGB [height, width, 3]. Deterministic."""
    unit = min(width, height)
    canvas = _ground(scene.background, width, height)
    for thing in scene.objects:
        center_x, center_y, radius = thing.x * width, thing.y * height, thing.radius * unit
        reach = radius * REACH + 1.0
        xs = slice(max(int(center_x - reach), 0), min(int(center_x + reach) + 1, width))
        ys = slice(max(int(center_y - reach), 0), min(int(center_y + reach) + 1, height))
        mask = coverage(thing.shape, center_x, center_y, radius, xs, ys)[:, :, None]
        patch = canvas[ys, xs]
        patch += mask * (_rgb(OBJECT_COLORS, thing.color) - patch)
    return (canvas + np.float32(0.5)).astype(np.uint8)


def _rgb(palette: dict[str, tuple[int, int, int]], name: str) -> Floats:
    return np.array(palette[name], dtype=np.float32)


def _ground(background: Background, width: int, height: int) -> Floats:
    """The background as float32 [height, width, 3] in 0..255, newly allocated."""
    first = _rgb(BACKGROUND_COLORS, background.colors[0])
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = first
    if background.kind != PLAIN:
        second = _rgb(BACKGROUND_COLORS, background.colors[1])
        canvas += _mix(background, width, height)[:, :, None] * (second - first)
    return canvas


def _mix(background: Background, width: int, height: int) -> Floats:
    """Share of the second colour at each pixel, broadcastable to [height, width]."""
    if background.kind == GRADIENT:
        if background.vertical:
            return np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
        return np.linspace(0.0, 1.0, width, dtype=np.float32)[None, :]
    period = background.period * min(width, height)
    across, down = _wave(width, period)[None, :], _wave(height, period)[:, None]
    if background.kind == CHECKERED:
        return across + down - 2.0 * across * down
    return across if background.vertical else down


@lru_cache(maxsize=64)
def _pixel_centers(length: int) -> Floats:
    return np.arange(length, dtype=np.float32) + np.float32(0.5)


def _wave(length: int, period: float) -> Floats:
    """Square wave of 0 and 1 with the given period in pixels and one-pixel soft edges."""
    phase = _pixel_centers(length) % np.float32(period)
    edge = np.minimum(phase, period - phase) - np.abs(phase - period / 2)
    wave: Floats = np.clip(0.5 - edge / 2, 0.0, 1.0).astype(np.float32)
    return wave
