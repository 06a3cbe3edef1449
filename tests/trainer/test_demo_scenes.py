import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

from trainer.demo.layout import REACH
from trainer.demo.scenes import (
    COUNT,
    FREE,
    KINDS,
    MIN_CONTRAST,
    OBJECT_COLORS,
    PLAIN,
    RELATION,
    SHAPES,
    SINGLE,
    SIZES,
    Background,
    Scene,
    SceneObject,
    contrast,
    held_out_keys,
    is_held_out,
    sample_dense_scene,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(1500)]


def _look(thing: SceneObject) -> tuple[str, str]:
    return thing.shape, thing.color


def test_same_seed_draws_the_same_scene():
    first, second = (sample_scene(np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_every_property_of_the_world_is_drawn(scenes):
    things = [thing for scene in scenes for thing in scene.objects]
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(OBJECT_COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    plain = sum(scene.background.kind == PLAIN for scene in scenes) / len(scenes)
    assert 0.65 < plain < 0.85


def test_objects_stay_inside_and_apart_on_every_canvas(scenes):
    rng = np.random.default_rng(1)
    for scene in [*scenes, *(sample_dense_scene(rng) for _ in range(300))]:
        for i, a in enumerate(scene.objects):
            reach = REACH * a.radius
            assert reach < min(a.x, a.y, 1 - a.x, 1 - a.y)
            for b in scene.objects[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_objects_contrast_with_their_background(scenes):
    for scene in scenes:
        for thing in scene.objects:
            assert contrast(thing.color, scene.background.colors) >= MIN_CONTRAST


def test_smallest_object_is_wide_enough_at_64_pixels(scenes):
    smallest = min(thing.radius for scene in scenes for thing in scene.objects)
    assert 2 * smallest * 64 >= 14


def test_relation_is_true_of_the_positions(scenes):
    for scene in scenes:
        if scene.kind != RELATION:
            assert scene.relation is None
            continue
        a, b = scene.objects
        apart = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        assert scene.relation is not None
        assert apart[scene.relation] > a.radius + b.radius
        assert max(apart, key=lambda name: apart[name]) == scene.relation


def test_kinds_hold_what_their_captions_assume(scenes):
    for scene in scenes:
        looks = Counter(_look(thing) for thing in scene.objects)
        if scene.kind == SINGLE:
            assert len(scene.objects) == 1
        if scene.kind == COUNT:
            assert len(looks) == 1
            assert 2 <= len(scene.objects) <= 4
        if scene.kind in (RELATION, FREE):
            assert len(looks) > 1
        for look in looks:
            assert len({thing.size for thing in scene.objects if _look(thing) == look}) == 1


def test_training_scenes_are_never_held_out(scenes):
    assert not any(is_held_out(scene) for scene in scenes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_of_every_kind_is_held_out(kind):
    rng = np.random.default_rng(2)
    drawn = [sample_scene(rng, kind=kind, allow_held_out=True) for _ in range(500)]
    assert 0.05 < sum(map(is_held_out, drawn)) / len(drawn) < 0.3


def test_held_out_keys_ignore_positions_and_the_order_of_a_relation():
    left = SceneObject("circle", "red", "small", 0.2, 0.5, 0.12)
    right = SceneObject("square", "blue", "small", 0.8, 0.5, 0.12)
    ground = Background(PLAIN, ("white",))
    one = Scene(RELATION, (left, right), ground, "left")
    moved = dataclasses.replace(left, x=0.3, y=0.4, radius=0.115)
    other = Scene(RELATION, (right, moved), ground, "right")
    assert sorted(held_out_keys(one)) == sorted(held_out_keys(other))
    above = Scene(RELATION, (left, right), ground, "above")
    assert set(held_out_keys(one)) != set(held_out_keys(above))


def test_dense_scenes_hold_four_to_seven_shapes():
    rng = np.random.default_rng(3)
    assert {len(sample_dense_scene(rng).objects) for _ in range(300)} == {4, 5, 6, 7}
