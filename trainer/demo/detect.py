"""Finds the objects in a picture of the demo world: where, which shape, which colour, how large.

The ground is estimated from the picture's border; what differs from it falls into connected
components; each is compared with the renderer's own shapes at the place and area it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.demo.components import label_components
from trainer.demo.layout import REACH
from trainer.demo.render import coverage
from trainer.demo.scenes import (
    BACKGROUND_COLORS,
    OBJECT_COLORS,
    PATTERN_PAIRS,
    SHAPES,
    SIZE_RANGES,
)

Floats = NDArray[np.float32]

UNKNOWN = "unknown"
# Distance in RGB from the ground at which a pixel may belong to an object; the weakest contrast
# of the world is 105 and reconstruction noise stays below 20.
FOREGROUND_DISTANCE = 45.0
# Blobs below this share of the shorter side squared are specks; the smallest star has 0.019.
MIN_AREA = 0.006
# Overlap with the best shape below which a blob is no shape at all.
MIN_OVERLAP = 0.75
# No object of the world is larger than 0.28; a picture without a ground can look like one.
MAX_RADIUS = 0.40
# Mean RGB distance of a blob's inside from its median colour, above which it has no one colour.
MAX_SPREAD = 50.0
# Share of a blob's pixels from which a second colour counts as a second object.
MIN_COLOR_SHARE = 0.2
_RING_SHARE = 0.02
_FAR = 60.0
_PATTERN_PENALTY = 2.0

_COLOR_NAMES = tuple(OBJECT_COLORS)
_PALETTE = np.array([OBJECT_COLORS[name] for name in _COLOR_NAMES], dtype=np.float32)
_GROUNDS = np.array(
    [(BACKGROUND_COLORS[name],) * 2 for name in BACKGROUND_COLORS]
    + [(BACKGROUND_COLORS[a], BACKGROUND_COLORS[b]) for a, b in PATTERN_PAIRS],
    dtype=np.float32,
)
_NUM_PLAIN = len(BACKGROUND_COLORS)


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: centre as fractions of the canvas, radius of its shorter side.

    `shape` is UNKNOWN where no shape of the world fits; `overlap` is the best fit's soft
    intersection over union.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    overlap: float


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """Detect all objects in a uint8 RGB image [H, W, 3], largest first."""
    pixels = image.astype(np.float32)
    ground = _estimate_ground(pixels)
    distance = _segment_distance(pixels, ground)
    min_area = MIN_AREA * min(image.shape[:2]) ** 2
    found = [
        _classify(pixels, distance, blob, ground)
        for blob in _blobs(pixels, distance, ground, min_area)
    ]
    return sorted(found, key=lambda item: -item.radius)


def _segment_distance(pixels: Floats, segment: Floats) -> Floats:
    """RGB distance of pixels [..., 3] to the mixes of two colours [2, 3]."""
    start, direction = segment[0], segment[1] - segment[0]
    offset = pixels - start
    length = float(direction @ direction)
    if length > 0.0:
        share = np.clip((offset @ direction) / length, 0.0, 1.0)
        offset = offset - share[..., None] * direction
    red, green, blue = offset[..., 0], offset[..., 1], offset[..., 2]
    distance: Floats = np.sqrt(red * red + green * green + blue * blue)
    return distance


def _estimate_ground(pixels: Floats) -> Floats:
    """The two colours [2, 3] whose mixes make up the ground (equal for a plain one).

    The world's own grounds are candidates; the best is moved to the colours really present.
    """
    height, width = pixels.shape[:2]
    ring = max(1, round(_RING_SHARE * min(height, width)))
    border = np.concatenate(
        [
            pixels[:ring].reshape(-1, 3),
            pixels[-ring:].reshape(-1, 3),
            pixels[ring:-ring, :ring].reshape(-1, 3),
            pixels[ring:-ring, -ring:].reshape(-1, 3),
        ]
    )
    scores = [float(np.minimum(_segment_distance(border, ends), _FAR).mean()) for ends in _GROUNDS]
    scores[_NUM_PLAIN:] = [score + _PATTERN_PENALTY for score in scores[_NUM_PLAIN:]]
    best: Floats = _GROUNDS[int(np.argmin(scores))]
    near = border[_segment_distance(border, best) < _FAR]
    if len(near) == 0 or not np.array_equal(best[0], best[1]):
        return best
    moved: Floats = np.repeat(np.median(near, axis=0)[None], 2, axis=0).astype(np.float32)
    return moved


def _blobs(
    pixels: Floats, distance: Floats, ground: Floats, min_area: float
) -> list[NDArray[np.bool_]]:
    """Masks of single objects: foreground components, cut where they are only blurred together."""
    blobs = []
    for rough in _components(distance > FOREGROUND_DISTANCE, min_area):
        strength = float(np.percentile(distance[rough], 80))
        for blob in _components(rough & (distance > 0.5 * strength), min_area):
            blobs.extend(_split_colors(pixels, blob, min_area))
    return blobs


def _components(mask: NDArray[np.bool_], min_area: float) -> list[NDArray[np.bool_]]:
    labels, count = label_components(mask)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == i for i in range(1, count + 1) if areas[i] >= min_area]


def _nearest_colors(pixels: Floats) -> NDArray[np.int64]:
    """Index of the nearest object colour for each pixel [n, 3]."""
    offset = pixels[:, None, :] - _PALETTE[None]
    nearest: NDArray[np.int64] = np.einsum("nkc,nkc->nk", offset, offset).argmin(axis=1)
    return nearest


def _split_colors(
    pixels: Floats, blob: NDArray[np.bool_], min_area: float
) -> list[NDArray[np.bool_]]:
    """Cut a blob into its colours where more than one holds a solid part of its inside."""
    inside = _eroded(blob)
    if inside.sum() < min_area / 2:
        return [blob]
    names = _nearest_colors(pixels[inside])
    shares = np.bincount(names, minlength=len(_PALETTE)) / len(names)
    if (shares >= MIN_COLOR_SHARE).sum() < 2:
        return [blob]
    colors = np.full(blob.shape, -1, dtype=np.int64)
    colors[blob] = _nearest_colors(pixels[blob])
    return [
        part
        for color in np.flatnonzero(shares >= MIN_COLOR_SHARE)
        for part in _components(colors == color, min_area)
    ]


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without pixels that touch its outside (or the picture's edge)."""
    inside = np.zeros_like(mask)
    inside[1:-1, 1:-1] = (
        mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    )
    return inside


def _classify(
    pixels: Floats, distance: Floats, blob: NDArray[np.bool_], ground: Floats
) -> Detection:
    height, width = blob.shape
    core = _eroded(blob)
    solid = core if core.any() else blob
    color = np.median(pixels[solid], axis=0).astype(np.float32)
    name = _COLOR_NAMES[int(_nearest_colors(color[None])[0])]
    contrast = max(float(_segment_distance(color, ground)), 1.0)
    covered, left, top = _soft_mask(distance, blob, contrast)
    shape, overlap, x, y, radius = _best_shape(covered)
    unit = min(height, width)
    spread = float(np.linalg.norm(pixels[solid] - color, axis=-1).mean())
    if overlap < MIN_OVERLAP or radius > MAX_RADIUS * unit or spread > MAX_SPREAD:
        shape = UNKNOWN
    return Detection(
        shape=shape,
        color=name,
        size=_size_name(radius / unit),
        x=(left + x) / width,
        y=(top + y) / height,
        radius=radius / unit,
        overlap=overlap,
    )


def _soft_mask(
    distance: Floats, blob: NDArray[np.bool_], contrast: float
) -> tuple[Floats, int, int]:
    """Coverage 0..1 in the blob's box with a margin for blurred edges; the box's left and top."""
    rows, columns = np.flatnonzero(blob.any(axis=1)), np.flatnonzero(blob.any(axis=0))
    margin = 2
    top, bottom = max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin
    left, right = max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin
    part = blob[top:bottom, left:right]
    near = part.copy()
    near[1:] |= part[:-1]
    near[:-1] |= part[1:]
    near[:, 1:] |= part[:, :-1]
    near[:, :-1] |= part[:, 1:]
    covered: Floats = np.clip(distance[top:bottom, left:right] / contrast, 0.0, 1.0)
    covered[part & (covered > 0.6)] = 1.0
    covered[~near] = 0.0
    return covered, left, top


@lru_cache(maxsize=1)
def _shape_moments() -> dict[str, tuple[float, float]]:
    """Area in squared radii and centroid height in radii of each shape."""
    moments, radius = {}, 100.0
    side = int(2 * radius * REACH) + 4
    for shape in SHAPES:
        mask = coverage(shape, side / 2, side / 2, radius, slice(0, side), slice(0, side))
        area = float(mask.sum(dtype=np.float64))
        rows = np.arange(side) + 0.5 - side / 2
        moments[shape] = area / radius**2, float((mask.sum(axis=1) * rows).sum() / area) / radius
    return moments


def _best_shape(covered: Floats) -> tuple[str, float, float, float, float]:
    """(shape, overlap, x, y, radius) of the best fit to a coverage map, in its pixels."""
    height, width = covered.shape
    area = float(covered.sum(dtype=np.float64))
    x = float((covered.sum(axis=0) * (np.arange(width) + 0.5)).sum() / area)
    y = float((covered.sum(axis=1) * (np.arange(height) + 0.5)).sum() / area)
    best = (UNKNOWN, -1.0, x, y, 0.0)
    for shape, (unit_area, unit_y) in _shape_moments().items():
        radius = math.sqrt(area / unit_area)
        center_y = y - unit_y * radius
        model = coverage(shape, x, center_y, radius, slice(0, width), slice(0, height))
        # What the model has outside the box counts as well: its whole area is `area`.
        shared = float(np.minimum(model, covered).sum(dtype=np.float64))
        overlap = shared / (2.0 * area - shared)
        if overlap > best[1]:
            best = (shape, overlap, x, center_y, radius)
    return best


def _size_name(radius: float) -> str:
    """The size whose range of radii lies nearest."""
    ranges = SIZE_RANGES.items()
    return min(ranges, key=lambda item: max(item[1][0] - radius, radius - item[1][1]))[0]
