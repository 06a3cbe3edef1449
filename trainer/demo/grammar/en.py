"""English captions of demo scenes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.demo.grammar.outline import DETAILED, MEDIUM, SHORT, TAGS, Group, Outline
from trainer.demo.scenes import CHECKERED, GRADIENT, PLAIN, STRIPED, Background

Rng = np.random.Generator

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
PLURALS = {"cross": "crosses"}
SIZE_WORDS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized"),
    "large": ("large", "large", "large", "big"),
}
RELATION_WORDS = {
    "left": ("to the left of", "to the left of", "left of", "on the left of"),
    "right": ("to the right of", "to the right of", "right of", "on the right of"),
    "above": ("above", "above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}
# "a circle with a square ... it": where the second object lies seen from the first.
MIRRORED_WORDS = {
    "left": ("to the right of it", "to its right"),
    "right": ("to the left of it", "to its left"),
    "above": ("below it", "under it"),
    "below": ("above it",),
}
SIDE_WORDS = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
REGION_WORDS = {
    (0, 0): ("in the center", "in the middle"),
    (-1, 0): ("on the left", "on the left side"),
    (1, 0): ("on the right", "on the right side"),
    (0, -1): ("at the top", "near the top"),
    (0, 1): ("at the bottom", "near the bottom"),
    (-1, -1): ("at the top left", "in the upper left"),
    (1, -1): ("at the top right", "in the upper right"),
    (-1, 1): ("at the bottom left", "in the lower left"),
    (1, 1): ("at the bottom right", "in the lower right"),
}
OPENINGS = ("a picture of ", "an image of ", "a drawing of ", "a photo of ")


def write(plan: Outline, level: str, rng: Rng) -> str:
    """Put a plan into English at the given level."""
    writers = {DETAILED: _detailed, MEDIUM: _medium, SHORT: _short, TAGS: _tags}
    text = writers[level](plan, rng)
    return text.replace("gray", "grey") if rng.random() < 0.25 else text


def _one_of(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _name(group: Group, rng: Rng, *, with_size: bool = True) -> str:
    """Size, colour and shape without article or number: 'small red circles'."""
    noun = group.shape
    if group.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    words = [noun]
    if group.color is not None:
        words.insert(0, group.color)
    if with_size and group.size is not None:
        words.insert(0, _one_of(rng, SIZE_WORDS[group.size]))
    return " ".join(words)


def _counted(group: Group, rng: Rng, *, articles: bool = True, digits: bool = False) -> str:
    """The group as users name it: 'an orange star', 'three small red circles'."""
    name = _name(group, rng)
    if group.count > 1:
        number = str(group.count) if digits else NUMBERS[group.count]
        return f"{number} {name}"
    if not articles:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _listed(parts: Sequence[str]) -> str:
    """Join with commas and a final 'and'."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pattern(background: Background, with_colors: bool) -> str:
    """A patterned background's own noun phrase, without article."""
    kind = {GRADIENT: "gradient", STRIPED: "striped", CHECKERED: "checkered"}[background.kind]
    if not with_colors:
        return f"{kind} background"
    first, second = background.colors
    if background.kind == GRADIENT:
        return f"gradient background from {first} to {second}"
    return f"{kind} {first} and {second} background"


def _ground_tag(plan: Outline, background: Background) -> str:
    """The background as a keyword: 'white background'."""
    if background.kind == PLAIN:
        return f"{background.colors[0]} background"
    return _pattern(background, plan.pattern_colors)


def _ground(plan: Outline, rng: Rng, *, commas: bool = False) -> str:
    """' on a white background', or nothing where the plan leaves the background out."""
    background = plan.background
    if background is None:
        return ""
    if commas and rng.random() < 0.1:
        return f", {_ground_tag(plan, background)}"
    preposition = _one_of(rng, ("on", "on", "on", "against"))
    if background.kind == PLAIN:
        plain = "plain " if rng.random() < 0.2 else ""
        return f" {preposition} a {plain}{background.colors[0]} background"
    if background.kind == STRIPED and plan.pattern_colors and rng.random() < 0.4:
        first, second = background.colors
        return f" {preposition} a background with {first} and {second} stripes"
    return f" {preposition} a {_pattern(background, plan.pattern_colors)}"


def _ending(text: str, rng: Rng, upper: float, period: float) -> str:
    """Vary capital and full stop as users do."""
    if rng.random() < upper:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < period else text


def _short(plan: Outline, rng: Rng) -> str:
    """What users type: 'a red circle above a blue square'."""
    articles, digits = bool(rng.random() < 0.85), bool(rng.random() < 0.15)
    names = [_counted(group, rng, articles=articles, digits=digits) for group in plan.groups]
    if plan.relation is None:
        text = _listed(names)
    elif rng.random() < 0.9:
        text = f"{names[0]} {_one_of(rng, RELATION_WORDS[plan.relation])} {names[1]}"
    else:
        text = f"{names[0]} with {names[1]} {_one_of(rng, MIRRORED_WORDS[plan.relation])}"
    if articles and rng.random() < 0.12:
        text = _one_of(rng, OPENINGS) + text
    return _ending(text + _ground(plan, rng, commas=True), rng, upper=0.3, period=0.2)


def _medium(plan: Outline, rng: Rng) -> str:
    """One full sentence."""
    names = [_counted(group, rng) for group in plan.groups]
    verb = "is" if plan.groups[0].count == 1 else "are"
    ground = _ground(plan, rng)
    options: tuple[str, ...]
    if plan.relation is not None:
        words = _one_of(rng, RELATION_WORDS[plan.relation])
        first, second = SIDE_WORDS[plan.relation]
        options = (
            f"{names[0]} is {words} {names[1]}{ground}",
            f"there is {names[0]} {words} {names[1]}{ground}",
            f"{names[0]} {first} and {names[1]} {second}{ground}",
            f"{names[0]}{ground} with {names[1]} {_one_of(rng, MIRRORED_WORDS[plan.relation])}",
        )
        return _ending(_one_of(rng, options), rng, upper=0.9, period=0.9)
    things = _listed(names)
    where = ""
    region = plan.groups[0].region
    if plan.num_objects == 1 and region is not None and rng.random() < 0.5:
        where = " " + _one_of(rng, REGION_WORDS[region])
    options = (
        f"there {verb} {things}{where}{ground}",
        f"the image shows {things}{where}{ground}",
        f"{things}{where} can be seen{ground}",
        f"a simple image with {things}{where}{ground}",
    )
    return _ending(_one_of(rng, options), rng, upper=0.9, period=0.9)


def _detailed(plan: Outline, rng: Rng) -> str:
    """Two or three sentences: the objects, where they are, and the background."""
    sentences = [_detailed_objects(plan, rng), *_detailed_places(plan, rng)]
    if plan.background is not None:
        sentences.append(_detailed_ground(plan.background, rng))
    return " ".join(text[0].upper() + text[1:] + "." for text in sentences)


def _detailed_objects(plan: Outline, rng: Rng) -> str:
    names = [_counted(group, rng) for group in plan.groups]
    options: tuple[str, ...]
    if plan.relation is not None:
        words = _one_of(rng, RELATION_WORDS[plan.relation])
        options = (
            f"{names[0]} is placed {words} {names[1]}",
            f"the image shows {names[0]} {words} {names[1]}",
            f"this picture contains {names[0]}, which is {words} {names[1]}",
        )
        return _one_of(rng, options)
    things = _listed(names)
    shapes = "shape" if plan.num_objects == 1 else "shapes"
    options = (
        f"the image shows {things}",
        f"this picture contains {things}",
        f"a simple drawing of {things}",
        f"the image contains {NUMBERS[plan.num_objects]} {shapes}: {things}",
    )
    return _one_of(rng, options)


def _detailed_places(plan: Outline, rng: Rng) -> list[str]:
    """Where each lone object stands; the relation says it already where there is one."""
    if plan.relation is not None:
        first, second = SIDE_WORDS[plan.relation]
        if rng.random() < 0.5:
            return []
        one, other = (_name(group, rng, with_size=False) for group in plan.groups)
        return [f"the {one} is {first} and the {other} is {second}"]
    lone = [group for group in plan.groups if group.region is not None]
    places = [
        f"the {_name(group, rng, with_size=False)} is {_one_of(rng, REGION_WORDS[group.region])}"
        for group in lone
        if group.region is not None
    ]
    if not places:
        return []
    if len(places) == 1 and plan.num_objects == 1:
        return [f"it is {_one_of(rng, REGION_WORDS[lone[0].region or (0, 0)])} of the image"]
    return [_listed(places)]


def _detailed_ground(background: Background, rng: Rng) -> str:
    first, second = background.colors[0], background.colors[-1]
    if background.kind == PLAIN:
        options: tuple[str, ...] = (
            f"the background is plain {first}",
            f"the background is solid {first}",
            f"the background is {first}",
        )
    elif background.kind == GRADIENT:
        start, end = ("top", "bottom") if background.vertical else ("left", "right")
        options = (
            f"the background is a gradient from {first} at the {start} to {second} at the {end}",
            f"the background fades from {first} to {second}",
        )
    elif background.kind == STRIPED:
        direction = "vertical" if background.vertical else "horizontal"
        options = (
            f"the background has {direction} {first} and {second} stripes",
            f"the background is striped in {first} and {second}",
        )
    else:
        options = (
            f"the background is a {first} and {second} checkerboard",
            f"the background is checkered in {first} and {second}",
        )
    return _one_of(rng, options)


def _tags(plan: Outline, rng: Rng) -> str:
    """Comma-separated keywords."""
    names = [_counted(group, rng, articles=False) for group in plan.groups]
    if plan.relation is not None and rng.random() < 0.5:
        words = _one_of(rng, RELATION_WORDS[plan.relation])
        tags = [f"{names[0]} {words} {names[1]}"]
    elif plan.relation is not None:
        tags = [
            f"{name} {side}" for name, side in zip(names, SIDE_WORDS[plan.relation], strict=True)
        ]
    else:
        tags = names
    if plan.background is not None:
        tags.append(_ground_tag(plan, plan.background))
    return ", ".join(tags)
