"""The exact judge: does a picture show what its prompt says?

A verdict counts every object. All that the expectation states must be there, the right number
of times, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.demo.detect import Detection, detect
from trainer.demo.scenes import RELATION, Scene

# Centres must lie further apart along the relation's axis than this share of the summed radii.
MIN_SEPARATION = 0.5


@dataclass(frozen=True, slots=True)
class ExpectedGroup:
    """`count` objects of one look; colour None where the prompt does not state it."""

    count: int
    shape: str
    color: str | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """All objects of the picture. `relation`: where groups[0] lies seen from groups[1]."""

    groups: tuple[ExpectedGroup, ...]
    relation: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the picture is right, why not (empty when it is), and what was seen."""

    correct: bool
    reason: str
    detections: tuple[Detection, ...]


def expected_of(scene: Scene, *, color: bool = True, relation: bool = True) -> Expected:
    """What a caption of the scene leads one to expect, with or without colours and relation."""
    if relation and scene.kind == RELATION:
        groups = [(thing.shape, thing.color if color else None) for thing in scene.objects]
        return Expected(tuple(ExpectedGroup(1, s, c) for s, c in groups), scene.relation)
    counts = Counter((thing.shape, thing.color if color else None) for thing in scene.objects)
    return Expected(tuple(ExpectedGroup(n, s, c) for (s, c), n in counts.items()))


def judge(image: NDArray[np.uint8], expected: Expected) -> Verdict:
    """Judge a uint8 RGB image [H, W, 3] against an expectation."""
    detections = tuple(detect(image))
    reason = _fault(detections, expected, image.shape[1], image.shape[0])
    return Verdict(not reason, reason, detections)


def _matches(detection: Detection, group: ExpectedGroup) -> bool:
    return detection.shape == group.shape and group.color in (None, detection.color)


def _fault(detections: tuple[Detection, ...], expected: Expected, width: int, height: int) -> str:
    """The first thing wrong with the picture, in words; empty where nothing is."""
    wanted: Counter[tuple[str, str | None]] = Counter()
    for group in expected.groups:
        wanted[group.shape, group.color] += group.count
    for (shape, color), count in wanted.items():
        name = f"{color} {shape}" if color else shape
        seen = sum(_matches(d, ExpectedGroup(count, shape, color)) for d in detections)
        if seen != count:
            return f"{seen} of {name}, expected {count}"
    total = wanted.total()
    if len(detections) != total:
        return f"{len(detections)} objects, expected {total}"
    if expected.relation is None:
        return ""
    return _relation_fault(detections, expected, width, height)


def _relation_fault(
    detections: tuple[Detection, ...], expected: Expected, width: int, height: int
) -> str:
    assert len(detections) == len(expected.groups) == 2
    one, other = detections
    if not _matches(one, expected.groups[0]) or not _matches(other, expected.groups[1]):
        one, other = other, one
    unit = min(width, height)
    reach = MIN_SEPARATION * (one.radius + other.radius) * unit
    right, down = (one.x - other.x) * width, (one.y - other.y) * height
    along, across = {
        "left": (-right, down),
        "right": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[expected.relation or ""]
    if along <= reach or along <= abs(across):
        return f"not {expected.relation}"
    return ""
