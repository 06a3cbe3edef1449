"""Where objects stand: non-overlapping centres for each kind of scene.

Centres are fractions of the canvas and radii fractions of its shorter side. A layout that keeps
objects apart on a square canvas keeps them apart on every other, where distances only grow.
"""

from __future__ import annotations

import math

import numpy as np

Center = tuple[float, float]

BORDER = 0.03
GAP = 0.05
MIN_GAP = 0.035  # in the tightest regular patterns
# Tips and corners extend this many radii from the centre along either axis (render.py).
REACH = 1.12
# Squares fill their box's corners: apart along the diagonal is not enough for them.
CORNER = 0.88
MAX_MISALIGNMENT = 0.08
# Fresh starts of a whole layout, and tries for each object in it.
_RESTARTS, _TRIES = 6, 16


def _spread(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _inside(rng: np.random.Generator, radius: float) -> float:
    edge = BORDER + REACH * radius
    return _spread(rng, edge, 1.0 - edge)


def place_single(rng: np.random.Generator, radius: float) -> Center:
    """Near the middle half of the time, anywhere inside otherwise."""
    if rng.random() < 0.5:
        return _spread(rng, 0.46, 0.54), _spread(rng, 0.46, 0.54)
    return _inside(rng, radius), _inside(rng, radius)


def place_relation(rng: np.random.Generator, radii: list[float], relation: str) -> list[Center]:
    """Two centres clearly apart along the relation's axis and roughly aligned on the other."""
    edges = [BORDER + REACH * radius for radius in radii]
    apart = REACH * sum(radii) + GAP
    room = max(1.0 - sum(edges) - apart, 0.0)
    # The pair takes up part of the room as distance and the rest as a shift of the whole.
    distance = min(apart + room * float(rng.random()) * 0.8, 1.0 - sum(edges))
    forward = relation in ("left", "above")
    low_edge, high_edge = edges if forward else reversed(edges)
    low = _spread(rng, low_edge, max(1.0 - high_edge - distance, low_edge))
    along = (low, low + distance) if forward else (low + distance, low)
    edge = max(edges)
    middle = _spread(rng, max(edge, 0.3), 1.0 - max(edge, 0.3))
    across = [
        min(max(middle + _spread(rng, -0.5, 0.5) * MAX_MISALIGNMENT, edge), 1.0 - edge)
        for _ in radii
    ]
    if relation in ("left", "right"):
        return list(zip(along, across, strict=True))
    return list(zip(across, along, strict=True))


def _apart(right: float, down: float, radii: float, gap: float) -> bool:
    """Whether two shapes with this summed radius keep the gap, whatever shapes they are."""
    if max(abs(right), abs(down)) < CORNER * radii + 0.7 * gap:
        return False
    return math.hypot(right, down) >= REACH * radii + gap


def place_free(
    rng: np.random.Generator, radii: list[float], gap: float = GAP
) -> list[Center] | None:
    """Independent random centres; None where the radii found no room in a few attempts."""
    for _ in range(_RESTARTS):
        centers: list[Center] = []
        for radius in radii:
            center = _free_center(rng, radius, radii, centers, gap)
            if center is None:
                break
            centers.append(center)
        else:
            return centers
    return None


def _free_center(
    rng: np.random.Generator,
    radius: float,
    radii: list[float],
    centers: list[Center],
    gap: float,
) -> Center | None:
    for _ in range(_TRIES):
        x, y = _inside(rng, radius), _inside(rng, radius)
        for other, (ox, oy) in zip(radii, centers, strict=False):
            if not _apart(x - ox, y - oy, radius + other, gap):
                break
        else:
            return x, y
    return None


def place_count(rng: np.random.Generator, radius: float, number: int) -> list[Center]:
    """2-4 equal objects: mostly a jittered row, column, triangle or square, else scattered."""
    if rng.random() < 0.3:
        scattered = place_free(rng, [radius] * number)
        if scattered is not None:
            return scattered
    patterns = [p for p in _PATTERNS[number] if _fits(p, radius, 0.0)]
    pattern = patterns[int(rng.integers(len(patterns)))]
    jitter = next(j for j in _JITTERS if _fits(pattern, radius, 2.0 * j))
    edge = BORDER + REACH * radius
    return [
        (
            min(max(x + _spread(rng, -jitter, jitter), edge), 1.0 - edge),
            min(max(y + _spread(rng, -jitter, jitter), edge), 1.0 - edge),
        )
        for x, y in pattern
    ]


_PATTERNS: dict[int, tuple[tuple[Center, ...], ...]] = {
    2: (
        ((0.26, 0.5), (0.74, 0.5)),
        ((0.5, 0.26), (0.5, 0.74)),
        ((0.27, 0.27), (0.73, 0.73)),
        ((0.73, 0.27), (0.27, 0.73)),
    ),
    3: (
        ((0.17, 0.5), (0.5, 0.5), (0.83, 0.5)),
        ((0.5, 0.17), (0.5, 0.5), (0.5, 0.83)),
        ((0.5, 0.26), (0.26, 0.73), (0.74, 0.73)),
        ((0.26, 0.27), (0.74, 0.27), (0.5, 0.74)),
    ),
    4: (
        ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
        ((0.5, 0.2), (0.2, 0.5), (0.8, 0.5), (0.5, 0.8)),
    ),
}


_JITTERS = (0.03, 0.02, 0.01, 0.0)


def _fits(pattern: tuple[Center, ...], radius: float, slack: float) -> bool:
    """Whether shapes of the radius stay apart when each distance shrinks by `slack`."""
    edge = min(min(x, y, 1.0 - x, 1.0 - y) for x, y in pattern)
    return edge >= REACH * radius + 0.01 and all(
        _apart(ax - bx, ay - by, 2.0 * radius, slack + MIN_GAP)
        for i, (ax, ay) in enumerate(pattern)
        for bx, by in pattern[:i]
    )
