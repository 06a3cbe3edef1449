"""What a caption says, before any language says it: the content plan of one scene.

The plan decides which properties are mentioned; the language modules decide the words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.demo.scenes import PLAIN, RELATION, Background, Scene, SceneObject

DETAILED, MEDIUM, SHORT, TAGS = "detailed", "medium", "short", "tags"
LEVELS: tuple[str, ...] = (DETAILED, MEDIUM, SHORT, TAGS)

# Chance that a caption of the level mentions the property at all.
_COLOR_CHANCE = {DETAILED: 1.0, MEDIUM: 1.0, SHORT: 0.72, TAGS: 0.9}
_SIZE_CHANCE = {DETAILED: 1.0, MEDIUM: 0.6, SHORT: 0.22, TAGS: 0.35}
_GROUND_CHANCE = {DETAILED: 1.0, MEDIUM: 0.7, SHORT: 0.4, TAGS: 0.6}
_RELATION_CHANCE = {DETAILED: 1.0, MEDIUM: 1.0, SHORT: 0.85, TAGS: 0.85}
_PATTERN_COLORS_CHANCE = {DETAILED: 1.0, MEDIUM: 0.8, SHORT: 0.5, TAGS: 0.6}

LOW_THIRD, HIGH_THIRD = 0.4, 0.6


@dataclass(frozen=True, slots=True)
class Mention:
    """Which properties a caption states; background colours count as part of the background."""

    color: bool = True
    size: bool = False
    background: bool = False
    relation: bool = True


@dataclass(frozen=True, slots=True)
class Group:
    """Objects that the caption calls by one name; None where a property is not mentioned.

    `region` is (column, row) in -1, 0, 1 and known for lone objects only.
    """

    count: int
    shape: str
    color: str | None
    size: str | None
    region: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Outline:
    """All that one caption says. `relation`: where groups[0] lies seen from groups[1]."""

    groups: tuple[Group, ...]
    relation: str | None
    background: Background | None
    pattern_colors: bool

    @property
    def num_objects(self) -> int:
        """Objects in the whole scene."""
        return sum(group.count for group in self.groups)


def outline(
    scene: Scene, level: str, rng: np.random.Generator, mention: Mention | None = None
) -> Outline:
    """Plan a caption of the level; `mention` fixes what is stated instead of drawing it."""
    if mention is None:
        mention = Mention(
            color=bool(rng.random() < _COLOR_CHANCE[level]),
            size=bool(rng.random() < _SIZE_CHANCE[level]),
            background=bool(rng.random() < _GROUND_CHANCE[level]),
            relation=bool(rng.random() < _RELATION_CHANCE[level]),
        )
        pattern_colors = bool(rng.random() < _PATTERN_COLORS_CHANCE[level])
    else:
        pattern_colors = True
    relation = scene.relation if mention.relation else None
    one_shape = len({thing.shape for thing in scene.objects}) == 1
    with_color = mention.color or (scene.kind == RELATION and one_shape)
    return Outline(
        _groups(scene, with_color, mention.size, relation is None),
        relation,
        scene.background if mention.background else None,
        pattern_colors or scene.background.kind == PLAIN,
    )


def region_of(thing: SceneObject) -> tuple[int, int]:
    """Column and row of the 3 x 3 grid in which the object's centre lies."""

    def third(position: float) -> int:
        return (position > HIGH_THIRD) - (position < LOW_THIRD)

    return third(thing.x), third(thing.y)


def _groups(scene: Scene, with_color: bool, with_size: bool, may_merge: bool) -> tuple[Group, ...]:
    """Merge objects that would have the same name, in order of first appearance."""
    names: dict[tuple[object, ...], list[SceneObject]] = {}
    for index, thing in enumerate(scene.objects):
        name = (
            thing.shape,
            thing.color if with_color else None,
            thing.size if with_size else None,
            None if may_merge else index,
        )
        names.setdefault(name, []).append(thing)
    return tuple(
        Group(
            len(members),
            members[0].shape,
            members[0].color if with_color else None,
            members[0].size if with_size else None,
            region_of(members[0]) if len(members) == 1 else None,
        )
        for members in names.values()
    )
