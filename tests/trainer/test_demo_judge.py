import numpy as np
import pytest
from PIL import Image, ImageFilter

from trainer.demo.components import label_components
from trainer.demo.detect import UNKNOWN, detect
from trainer.demo.judge import Expected, ExpectedGroup, expected_of, judge
from trainer.demo.render import render
from trainer.demo.scenes import (
    COUNT,
    FREE,
    PLAIN,
    RELATION,
    SINGLE,
    Background,
    Scene,
    SceneObject,
    sample_dense_scene,
    sample_scene,
)

WHITE = Background(PLAIN, ("white",))
CIRCLE = SceneObject("circle", "red", "small", 0.25, 0.5, 0.12)
SQUARE = SceneObject("square", "blue", "medium", 0.7, 0.5, 0.16)


def _scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(number)]


def _share_right(scenes: list[Scene], width: int, height: int) -> float:
    right = [judge(render(s, width, height), expected_of(s)).correct for s in scenes]
    return sum(right) / len(right)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 96), (128, 128), (64, 112)])
def test_real_renders_are_right(width, height):
    assert _share_right(_scenes(200), width, height) >= 0.99


@pytest.mark.very_slow
@pytest.mark.parametrize(("size", "number"), [(64, 1000), (96, 500), (128, 500), (256, 100)])
def test_many_real_renders_are_right(size, number):
    assert _share_right(_scenes(number, seed=1), size, size) >= 0.99


def test_dense_renders_are_right():
    rng = np.random.default_rng(2)
    assert _share_right([sample_dense_scene(rng) for _ in range(60)], 64, 64) >= 0.99


def test_blurred_and_noisy_renders_are_right():
    rng = np.random.default_rng(3)
    right = []
    for scene in _scenes(200, seed=3):
        blurred = Image.fromarray(render(scene, 64, 64)).filter(ImageFilter.GaussianBlur(0.7))
        noisy = np.asarray(blurred) + rng.normal(0.0, 6.0, (64, 64, 3))
        right.append(judge(np.clip(noisy, 0, 255).astype(np.uint8), expected_of(scene)).correct)
    assert sum(right) / len(right) >= 0.98


def test_shuffled_expectations_score_near_chance():
    scenes = _scenes(300, seed=4)
    shuffled = scenes[1:] + scenes[:1]
    right = [
        judge(render(scene, 64, 64), expected_of(other)).correct
        for scene, other in zip(scenes, shuffled, strict=True)
    ]
    assert sum(right) / len(right) <= 0.03


def test_positions_sizes_and_radii_are_measured():
    for scene in _scenes(60, seed=5):
        found = detect(render(scene, 96, 64))
        for thing in scene.objects:
            near = min(found, key=lambda d: (d.x - thing.x) ** 2 + (d.y - thing.y) ** 2)
            assert (near.shape, near.color, near.size) == (thing.shape, thing.color, thing.size)
            assert near.x == pytest.approx(thing.x, abs=0.01)
            assert near.y == pytest.approx(thing.y, abs=0.01)
            # Half a pixel of a small shape.
            assert near.radius == pytest.approx(thing.radius, rel=0.06)


def test_empty_and_noise_pictures_hold_no_shapes():
    assert detect(np.full((64, 64, 3), 255, dtype=np.uint8)) == []
    noise = np.random.default_rng(6).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert all(found.shape == UNKNOWN for found in detect(noise))


def test_a_shapeless_blob_is_unknown_and_wrong():
    image = np.full((64, 64, 3), 255, dtype=np.uint8)
    image[10:14, 10:50] = (220, 40, 40)
    (found,) = detect(image)
    assert (found.shape, found.color) == (UNKNOWN, "red")
    assert not judge(image, Expected((ExpectedGroup(1, "square", "red"),))).correct


def test_touching_objects_of_two_colors_are_told_apart():
    near = SceneObject("square", "blue", "medium", 0.55, 0.5, 0.16)
    one = SceneObject("square", "red", "medium", 0.27, 0.5, 0.16)
    image = render(Scene(FREE, (one, near), WHITE), 64, 64)
    assert sorted((d.color, d.shape) for d in detect(image)) == [
        ("blue", "square"),
        ("red", "square"),
    ]


def test_wrong_color_shape_count_and_extra_objects_are_named():
    image = render(Scene(SINGLE, (CIRCLE,), WHITE), 64, 64)
    both = render(Scene(FREE, (CIRCLE, SQUARE), WHITE), 64, 64)
    red_circle = ExpectedGroup(1, "circle", "red")
    assert judge(image, Expected((ExpectedGroup(1, "circle", "blue"),))).reason == (
        "0 of blue circle, expected 1"
    )
    assert not judge(image, Expected((ExpectedGroup(1, "square"),))).correct
    assert not judge(image, Expected((ExpectedGroup(2, "circle"),))).correct
    assert judge(image, Expected((red_circle,))).correct
    assert judge(both, Expected((red_circle,))).reason == "2 objects, expected 1"


@pytest.mark.parametrize(
    ("relation", "correct"),
    [("left", True), ("right", False), ("above", False), ("below", False), (None, True)],
)
def test_relations_are_checked_in_the_stated_order(relation, correct):
    image = render(Scene(RELATION, (CIRCLE, SQUARE), WHITE, "left"), 64, 64)
    groups = (ExpectedGroup(1, "circle", "red"), ExpectedGroup(1, "square", "blue"))
    assert judge(image, Expected(groups, relation)).correct is correct


def test_diagonal_neighbours_are_not_beside_each_other():
    below = SceneObject("square", "blue", "medium", 0.5, 0.8, 0.16)
    above = SceneObject("circle", "red", "small", 0.3, 0.3, 0.12)
    image = render(Scene(FREE, (above, below), WHITE), 64, 64)
    groups = (ExpectedGroup(1, "circle"), ExpectedGroup(1, "square"))
    assert not judge(image, Expected(groups, "left")).correct
    assert judge(image, Expected(groups, "above")).correct


def test_expectation_of_a_count_groups_equal_objects():
    other = SceneObject("circle", "red", "small", 0.7, 0.5, 0.12)
    scene = Scene(COUNT, (CIRCLE, other), WHITE)
    assert expected_of(scene) == Expected((ExpectedGroup(2, "circle", "red"),))
    assert expected_of(scene, color=False) == Expected((ExpectedGroup(2, "circle", None),))


def test_components_agree_with_a_flood_fill():
    rng = np.random.default_rng(7)
    for share in (0.2, 0.5, 0.7):
        mask = rng.random((23, 31)) < share
        labels, count = label_components(mask)
        assert count == _flood_count(mask)
        assert ((labels > 0) == mask).all()
        for number in range(1, count + 1):
            assert _flood_count(labels == number) == 1


def test_components_of_empty_and_full_masks():
    assert label_components(np.zeros((4, 5), dtype=bool))[1] == 0
    assert label_components(np.ones((4, 5), dtype=bool))[1] == 1


def _flood_count(mask: np.ndarray) -> int:
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    count = 0
    while left:
        count += 1
        queue = [left.pop()]
        while queue:
            y, x = queue.pop()
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    queue.append(near)
    return count
