"""What a demo scene is, and how scenes are drawn at random.

A scene is data, not pixels: positions are fractions of the canvas (x right, y down), and radii are
fractions of its shorter side, so that one scene renders at every size and aspect ratio.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np

from trainer.demo.layout import place_count, place_free, place_relation, place_single

RGB = tuple[int, int, int]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross")

OBJECT_COLORS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "orange": (245, 130, 25),
    "purple": (140, 50, 180),
    "pink": (245, 125, 190),
    "cyan": (50, 200, 220),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}

BACKGROUND_COLORS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "light gray": (208, 208, 208),
    "gray": (140, 140, 145),
    "dark gray": (72, 72, 78),
    "pale blue": (200, 220, 245),
    "pale green": (205, 235, 205),
    "pale pink": (250, 222, 228),
    "cream": (250, 242, 205),
    "lavender": (225, 212, 245),
    "beige": (228, 208, 180),
    "navy": (25, 30, 70),
}

PLAIN, GRADIENT, STRIPED, CHECKERED = "plain", "gradient", "striped", "checkered"
BACKGROUND_KINDS: tuple[str, ...] = (PLAIN, GRADIENT, STRIPED, CHECKERED)
# Two muted colours per pattern; every pair lies clear of the object colours along its whole mix.
PATTERN_PAIRS: tuple[tuple[str, str], ...] = (
    ("white", "pale blue"),
    ("white", "light gray"),
    ("white", "pale pink"),
    ("white", "pale green"),
    ("cream", "beige"),
    ("pale blue", "lavender"),
    ("black", "dark gray"),
    ("navy", "dark gray"),
)

# Radius ranges in units of the shorter side. A single object may be larger than one of several.
SIZE_RANGES: dict[str, tuple[float, float]] = {
    "small": (0.112, 0.126),
    "medium": (0.150, 0.170),
    "large": (0.195, 0.220),
}
SINGLE_LARGE_RANGE = (0.215, 0.275)
SIZES: tuple[str, ...] = tuple(SIZE_RANGES)

SINGLE, RELATION, COUNT, FREE, DENSE = "single", "relation", "count", "free", "dense"
KINDS: tuple[str, ...] = (SINGLE, RELATION, COUNT, FREE)
# Binding colours to shapes is learnt from scenes of several looks, so FREE has the largest share.
KIND_WEIGHTS: tuple[float, ...] = (0.19, 0.21, 0.20, 0.40)
RELATIONS: tuple[str, ...] = ("left", "right", "above", "below")
OPPOSITE: dict[str, str] = {"left": "right", "right": "left", "above": "below", "below": "above"}

PLAIN_SHARE = 0.75
WHITE_SHARE = 0.35
MIN_CONTRAST = 105.0
DENSE_GAP = 0.03
HELD_OUT_PER_MILLE = 60
# Part of the hash; chosen so that the plainest prompts of the README stay in the training set.
HELD_OUT_SALT = "demo-5"


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape: names, centre as fractions of width and height, radius of the shorter side."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Background:
    """One colour for a plain ground, two for a pattern; `period` in units of the shorter side."""

    kind: str
    colors: tuple[str, ...]
    vertical: bool = False
    period: float = 0.25

    @property
    def name(self) -> str:
        """Identity for hashing: kind and colours, without direction and period."""
        return f"{self.kind}:{'/'.join(self.colors)}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects on a background. `relation`: where objects[0] lies seen from objects[1]."""

    kind: str
    objects: tuple[SceneObject, ...]
    background: Background
    relation: str | None = None


def contrast(color: str, background_colors: tuple[str, ...]) -> float:
    """RGB distance from an object colour to the nearest mix of the background's colours."""
    point = OBJECT_COLORS[color]
    ends = [BACKGROUND_COLORS[name] for name in background_colors]
    start, direction = ends[0], [b - a for a, b in zip(ends[0], ends[-1], strict=True)]
    length = sum(d * d for d in direction)
    along = sum((p - s) * d for p, s, d in zip(point, start, direction, strict=True))
    share = min(max(along / length, 0.0), 1.0) if length else 0.0
    return math.dist(point, [s + share * d for s, d in zip(start, direction, strict=True)])


_GROUNDS = [(name,) for name in BACKGROUND_COLORS] + list(PATTERN_PAIRS)
_CONTRASTING = {
    ground: frozenset(c for c in OBJECT_COLORS if contrast(c, ground) >= MIN_CONTRAST)
    for ground in _GROUNDS
}
_COLOR_NAMES = tuple(OBJECT_COLORS)


def held_out_keys(scene: Scene) -> tuple[str, ...]:
    """Content keys, free of positions, by which a scene may be reserved for evaluation.

    Every key is what one evaluation prompt says, so that no training scene can be captioned with
    the words of a held-out prompt. Single objects are keyed by three properties at a time: all
    shapes and all colours must be trained on.
    """
    pairs = sorted((o.shape, o.color) for o in scene.objects)
    names = " ".join(f"{color} {shape}" for shape, color in pairs)
    shapes = " ".join(shape for shape, _ in pairs)
    ground = scene.background.name
    if len(scene.objects) == 1:
        (thing,) = scene.objects
        return (
            f"look|{thing.size} {names}",
            f"color|{names}|{ground}",
            f"setting|{thing.size} {shapes}|{ground}",
        )
    keys = [f"objects|{names}", f"setting|{shapes}|{ground}"]
    if scene.relation is not None:
        first, second = scene.objects[:2]
        relation = scene.relation
        if relation in ("right", "below"):
            first, second, relation = second, first, OPPOSITE[relation]
        keys.append(
            f"relation|{first.color} {first.shape}|{relation}|{second.color} {second.shape}"
        )
    return tuple(keys)


def is_held_out_key(key: str) -> bool:
    """Whether a content key falls in the bucket reserved for evaluation (6 % of all keys)."""
    return zlib.crc32(f"{HELD_OUT_SALT}|{key}".encode()) % 1000 < HELD_OUT_PER_MILLE


def is_held_out(scene: Scene) -> bool:
    """Whether any content key of the scene is reserved for evaluation."""
    return any(is_held_out_key(key) for key in held_out_keys(scene))


def sample_scene(
    rng: np.random.Generator, *, kind: str | None = None, allow_held_out: bool = False
) -> Scene:
    """Draw one scene of 1-4 objects; `kind` None draws it from KIND_WEIGHTS.

    Training scenes (the default) never have a held-out content key.
    """
    chosen = kind or KINDS[_pick(rng, KIND_WEIGHTS)]
    while True:
        scene = _SAMPLERS[chosen](rng)
        if scene is not None and (allow_held_out or not is_held_out(scene)):
            return scene


def sample_dense_scene(rng: np.random.Generator) -> Scene:
    """Draw 4-7 shapes on any background: more edges and colours per image, to train the VAE."""
    while True:
        looks = [_look(rng) for _ in range(4 + int(rng.integers(4)))]
        background = _background(rng, {color for _, color in looks}, plain_share=0.4)
        if background is not None:
            roomy = len(looks) < 6
            sizes = ["medium" if roomy and rng.random() < 0.35 else "small" for _ in looks]
            radii = [_radius(rng, size) * (1.0 if roomy else 0.9) for size in sizes]
            centers = place_free(rng, radii, gap=DENSE_GAP)
            if centers is not None:
                return Scene(DENSE, _objects(looks, sizes, radii, centers), background)


def _pick(rng: np.random.Generator, weights: tuple[float, ...]) -> int:
    """Index drawn with the given weights (much faster than Generator.choice)."""
    point = rng.random() * sum(weights)
    for index, edge in enumerate(itertools.accumulate(weights)):
        if point < edge:
            return index
    return len(weights) - 1


def _look(rng: np.random.Generator) -> tuple[str, str]:
    shape, color = divmod(int(rng.integers(len(SHAPES) * len(_COLOR_NAMES))), len(_COLOR_NAMES))
    return SHAPES[shape], _COLOR_NAMES[color]


def _radius(rng: np.random.Generator, size: str, single: bool = False) -> float:
    low, high = SINGLE_LARGE_RANGE if single and size == "large" else SIZE_RANGES[size]
    return low + (high - low) * float(rng.random())


def _background(
    rng: np.random.Generator, colors: set[str], plain_share: float = PLAIN_SHARE
) -> Background | None:
    """A ground on which all object colours stand out, or None where there is none."""
    if rng.random() < plain_share:
        if rng.random() < WHITE_SHARE and colors <= _CONTRASTING[("white",)]:
            return Background(PLAIN, ("white",))
        grounds = [(name,) for name in BACKGROUND_COLORS if colors <= _CONTRASTING[(name,)]]
        return Background(PLAIN, grounds[int(rng.integers(len(grounds)))]) if grounds else None
    pairs = [pair for pair in PATTERN_PAIRS if colors <= _CONTRASTING[pair]]
    if not pairs:
        return None
    pair = pairs[int(rng.integers(len(pairs)))]
    kind = BACKGROUND_KINDS[1 + int(rng.integers(3))]
    period = 0.20 + 0.15 * float(rng.random())
    return Background(kind, pair, vertical=bool(rng.random() < 0.5), period=period)


def _objects(
    looks: list[tuple[str, str]],
    sizes: list[str],
    radii: list[float],
    centers: list[tuple[float, float]],
) -> tuple[SceneObject, ...]:
    return tuple(
        SceneObject(shape, color, size, x, y, radius)
        for (shape, color), size, radius, (x, y) in zip(looks, sizes, radii, centers, strict=True)
    )


def _single(rng: np.random.Generator) -> Scene | None:
    look = _look(rng)
    background = _background(rng, {look[1]})
    if background is None:
        return None
    size = SIZES[_pick(rng, (0.27, 0.38, 0.35))]
    radius = _radius(rng, size, single=True)
    return Scene(
        SINGLE, _objects([look], [size], [radius], [place_single(rng, radius)]), background
    )


def _relation(rng: np.random.Generator) -> Scene | None:
    looks = [_look(rng), _look(rng)]
    background = _background(rng, {looks[0][1], looks[1][1]})
    if looks[0] == looks[1] or background is None:
        return None
    relation = RELATIONS[int(rng.integers(4))]
    sizes = [SIZES[_pick(rng, (0.3, 0.45, 0.25))] for _ in looks]
    radii = [_radius(rng, size) for size in sizes]
    if sizes[0] == sizes[1] == "large":
        radii = [SIZE_RANGES["large"][0]] * 2  # more would not fit side by side
    centers = place_relation(rng, radii, relation)
    return Scene(RELATION, _objects(looks, sizes, radii, centers), background, relation)


def _count(rng: np.random.Generator) -> Scene | None:
    look = _look(rng)
    background = _background(rng, {look[1]})
    if background is None:
        return None
    number = 2 + int(rng.integers(3))
    size = SIZES[_pick(rng, (0.45, 0.55, 0.0) if number > 2 else (0.3, 0.45, 0.25))]
    radius = _radius(rng, size)
    centers = place_count(rng, radius, number)
    return Scene(
        COUNT, _objects([look] * number, [size] * number, [radius] * number, centers), background
    )


def _free(rng: np.random.Generator) -> Scene | None:
    """2-4 objects in one to four groups of equal looks, e.g. two blue squares and a red star."""
    number = 2 + _pick(rng, (0.66, 0.22, 0.12))
    looks = [_look(rng) for _ in range(number)]
    if number > 2 and rng.random() < 0.5:
        looks[1] = looks[0]
    if len(set(looks)) == 1:
        return None
    background = _background(rng, {color for _, color in looks})
    if background is None:
        return None
    weights = {2: (0.35, 0.45, 0.2), 3: (0.4, 0.6, 0.0), 4: (0.7, 0.3, 0.0)}[number]
    size_of = {look: SIZES[_pick(rng, weights)] for look in dict.fromkeys(looks)}
    sizes = [size_of[look] for look in looks]
    radius_of = {look: _radius(rng, size) for look, size in size_of.items()}
    radii = [radius_of[look] for look in looks]
    centers = place_free(rng, radii)
    return (
        None if centers is None else Scene(FREE, _objects(looks, sizes, radii, centers), background)
    )


_SAMPLERS = {SINGLE: _single, RELATION: _relation, COUNT: _count, FREE: _free}
