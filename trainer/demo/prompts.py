"""Held-out evaluation prompts for GenEval's six tasks, each with what its picture must show.

Every prompt states exactly the content of a held-out key (scenes.held_out_keys), so training
never saw its words, although it saw each shape, colour, count and relation in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.demo.grammar import Mention, caption
from trainer.demo.grammar.outline import DETAILED, SHORT
from trainer.demo.judge import Expected, expected_of
from trainer.demo.scenes import (
    COUNT,
    FREE,
    RELATION,
    SINGLE,
    Scene,
    held_out_keys,
    is_held_out_key,
    sample_scene,
)

TASKS: tuple[str, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attribution",
)
EVALUATED_LEVELS: tuple[str, ...] = (SHORT, DETAILED)


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One prompt of the suite and the judge's expectation of its picture."""

    task: str
    level: str
    language: str
    text: str
    expected: Expected


def eval_prompts(
    level: str = SHORT, language: str = "en", per_task: int = 50, seed: int = 0
) -> list[EvalPrompt]:
    """`per_task` prompts of each task, tasks taking turns, no text twice. Deterministic.

    A short prompt states its held-out content and no more; at the other levels the caption says
    all it usually says, and the picture must show that.
    """
    columns = [_task_prompts(task, level, language, per_task, seed) for task in TASKS]
    return [prompt for row in zip(*columns, strict=True) for prompt in row]


def _task_prompts(task: str, level: str, language: str, number: int, seed: int) -> list[EvalPrompt]:
    rng = np.random.default_rng((seed, zlib.crc32(f"{task}|{level}|{language}".encode())))
    kind, choose = _TASKS[task]
    prompts: dict[str, EvalPrompt] = {}
    while len(prompts) < number:
        scene = sample_scene(rng, kind=kind, allow_held_out=True)
        mention = choose(scene, {key for key in held_out_keys(scene) if is_held_out_key(key)})
        if mention is None:
            continue
        if level != SHORT:
            mention = Mention(color=True, size=True, background=True, relation=True)
        text = caption(scene, level, language, rng, mention)
        expected = expected_of(scene, color=mention.color, relation=mention.relation)
        prompts.setdefault(text, EvalPrompt(task, level, language, text, expected))
    return list(prompts.values())


def _has(keys: set[str], family: str) -> bool:
    return any(key.startswith(f"{family}|") for key in keys)


def _differ(scene: Scene) -> bool:
    """Whether the scene is two objects of different shapes and different colours."""
    things = scene.objects
    return (
        len(things) == 2
        and things[0].shape != things[1].shape
        and things[0].color != things[1].color
    )


def _single_object(scene: Scene, keys: set[str]) -> Mention | None:
    return Mention(color=False, size=True, background=True) if _has(keys, "setting") else None


def _two_object(scene: Scene, keys: set[str]) -> Mention | None:
    if not _has(keys, "setting") or not _differ(scene):
        return None
    return Mention(color=False, background=True)


def _counting(scene: Scene, keys: set[str]) -> Mention | None:
    if _has(keys, "objects"):
        return Mention(color=True)
    return Mention(color=False, background=True) if _has(keys, "setting") else None


def _colors(scene: Scene, keys: set[str]) -> Mention | None:
    if _has(keys, "color"):
        return Mention(color=True, background=True)
    return Mention(color=True, size=True) if _has(keys, "look") else None


def _position(scene: Scene, keys: set[str]) -> Mention | None:
    return Mention(color=True, relation=True) if _has(keys, "relation") else None


def _color_attribution(scene: Scene, keys: set[str]) -> Mention | None:
    return Mention(color=True) if _has(keys, "objects") and _differ(scene) else None


_Choose = Callable[[Scene, set[str]], Mention | None]
_TASKS: dict[str, tuple[str, _Choose]] = {
    "single_object": (SINGLE, _single_object),
    "two_object": (FREE, _two_object),
    "counting": (COUNT, _counting),
    "colors": (SINGLE, _colors),
    "position": (RELATION, _position),
    "color_attribution": (FREE, _color_attribution),
}
