import re

import numpy as np
import pytest

from trainer.demo.grammar import LANGUAGES, LEVELS, Mention, caption
from trainer.demo.grammar.outline import outline
from trainer.demo.scenes import (
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

CIRCLE = SceneObject("circle", "red", "small", 0.25, 0.5, 0.12)
SQUARE = SceneObject("square", "blue", "large", 0.7, 0.5, 0.21)
WHITE = Background(PLAIN, ("white",))
NUMBER_WORDS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


def _variants(scene: Scene, level: str, mention: Mention | None = None) -> set[str]:
    rng = np.random.default_rng(0)
    return {caption(scene, level, "en", rng, mention) for _ in range(400)}


def test_captions_repeat_for_the_same_generator_seed():
    scene = Scene(RELATION, (CIRCLE, SQUARE), WHITE, "left")
    first, second = (caption(scene, "short", "en", np.random.default_rng(3)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_kind_of_scene_has_a_well_formed_caption(level, language):
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng) for _ in range(200)] + [sample_dense_scene(rng) for _ in range(20)]
    for scene in scenes:
        text = caption(scene, level, language, rng)
        assert text == text.strip()
        assert "  " not in text
        assert "None" not in text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)


def test_short_captions_include_what_users_type():
    single = Scene(SINGLE, (CIRCLE,), WHITE)
    pair = Scene(RELATION, (CIRCLE, SQUARE), WHITE, "left")
    assert {
        "a red circle",
        "A red circle",
        "a red circle.",
        "red circle",
        "a circle",
        "a red circle on a white background",
        "a small red circle",
    } <= _variants(single, "short")
    assert {
        "a red circle to the left of a blue square",
        "a circle left of a square",
        "a small red circle to the left of a large blue square",
    } <= _variants(pair, "short")


def test_groups_of_one_look_are_counted_with_the_right_plural():
    cross = SceneObject("cross", "green", "small", 0.2, 0.2, 0.12)
    scene = Scene(FREE, (cross, cross, SQUARE), WHITE)
    mention = Mention(color=True)
    for text in _variants(scene, "short", mention):
        assert re.search(r"(two|2) green crosses and (a )?blue square", text, re.IGNORECASE)


def test_colors_left_out_merge_groups_of_one_shape():
    other = SceneObject("circle", "green", "small", 0.7, 0.5, 0.12)
    scene = Scene(FREE, (CIRCLE, other), WHITE)
    plan = outline(scene, "short", np.random.default_rng(0), Mention(color=False))
    assert [(group.count, group.shape, group.color) for group in plan.groups] == [
        (2, "circle", None)
    ]


def test_a_relation_of_one_shape_always_names_the_colors():
    other = SceneObject("circle", "green", "small", 0.7, 0.5, 0.12)
    scene = Scene(RELATION, (CIRCLE, other), WHITE, "left")
    plan = outline(scene, "short", np.random.default_rng(0), Mention(color=False))
    assert [group.color for group in plan.groups] == ["red", "green"]


def test_detailed_captions_say_everything():
    scene = Scene(RELATION, (CIRCLE, SQUARE), WHITE, "left")
    for text in _variants(scene, "detailed"):
        assert re.search(r"(small|little|tiny) red circle", text)
        assert re.search(r"(large|big) blue square", text)
        assert "left" in text
        assert "white" in text
        assert text.endswith(".")


def test_mentioned_counts_agree_with_the_scene():
    rng = np.random.default_rng(5)
    for _ in range(300):
        scene = sample_scene(rng)
        text = caption(scene, "medium", "en", rng).lower()
        shapes = r"(?:circle|square|triangle|star|diamond|cross)"
        named = re.findall(rf"\b(an?|two|three|four) (?:[\w-]+ ){{0,3}}?{shapes}", text)
        assert sum(NUMBER_WORDS[word] for word in named) == len(scene.objects), text


def test_unknown_level_and_language_are_refused():
    scene, rng = Scene(SINGLE, (CIRCLE,), WHITE), np.random.default_rng(0)
    with pytest.raises(ValueError, match="level is 'long'; allowed are detailed"):
        caption(scene, "long", "en", rng)
    with pytest.raises(ValueError, match="language is 'xx'; allowed are en"):
        caption(scene, "short", "xx", rng)
