import numpy as np
import pytest

from trainer.demo.render import coverage, render
from trainer.demo.scenes import (
    BACKGROUND_COLORS,
    CHECKERED,
    GRADIENT,
    OBJECT_COLORS,
    PLAIN,
    SHAPES,
    SINGLE,
    STRIPED,
    Background,
    Scene,
    SceneObject,
    sample_scene,
)

WHITE = Background(PLAIN, ("white",))


def _scene(background: Background = WHITE, radius: float = 0.2, shape: str = "circle") -> Scene:
    return Scene(SINGLE, (SceneObject(shape, "red", "large", 0.5, 0.5, radius),), background)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (96, 160)])
def test_shape_type_and_exact_colors(width, height):
    image = render(_scene(), width, height)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert tuple(image[height // 2, width // 2]) == OBJECT_COLORS["red"]
    assert tuple(image[0, 0]) == BACKGROUND_COLORS["white"]


def test_objects_keep_their_proportions_on_a_wide_canvas():
    square, wide = render(_scene(), 64, 64), render(_scene(), 128, 64)
    np.testing.assert_array_equal(wide[:, 32:96], square)


def test_rendering_is_deterministic():
    scene = sample_scene(np.random.default_rng(0))
    np.testing.assert_array_equal(render(scene, 64, 64), render(scene, 64, 64))


def test_circle_covers_its_area():
    radius = 20.3
    covered = coverage("circle", 32.2, 31.7, radius, slice(0, 64), slice(0, 64))
    assert covered.sum() == pytest.approx(np.pi * radius**2, rel=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_upright_and_mirror_symmetric(shape):
    covered = coverage(shape, 32.0, 32.0, 20.0, slice(0, 64), slice(0, 64))
    np.testing.assert_allclose(covered, covered[:, ::-1], atol=1e-4)
    assert covered.max() == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased(shape):
    image = render(_scene(shape=shape, radius=0.203), 64, 64)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) >= 3


def test_large_pictures_shrink_to_the_small_ones():
    rng = np.random.default_rng(1)
    for _ in range(10):
        scene = sample_scene(rng)
        large = render(scene, 256, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(large - render(scene, 64, 64)).mean() < 2.0


def test_gradient_runs_from_the_first_to_the_second_color():
    image = render(_scene(Background(GRADIENT, ("black", "dark gray"), vertical=True)), 64, 64)
    assert tuple(image[0, 0]) == BACKGROUND_COLORS["black"]
    assert tuple(image[-1, 0]) == BACKGROUND_COLORS["dark gray"]
    np.testing.assert_array_equal(image[0, 0], image[0, -1])


def test_vertical_stripes_differ_along_a_row_only():
    image = render(_scene(Background(STRIPED, ("white", "pale blue"), vertical=True)), 64, 64)
    assert len(np.unique(image[0], axis=0)) > 1
    assert len(np.unique(image[:, 0], axis=0)) == 1


def test_checkers_alternate_in_both_directions():
    image = render(_scene(Background(CHECKERED, ("white", "light gray"), period=0.25)), 64, 64)
    tile = 64 // 8
    assert tuple(image[0, 0]) != tuple(image[0, tile])
    assert tuple(image[0, 0]) == tuple(image[tile, tile])
