"""Captions of demo scenes from a grammar: four levels of detail, one module per language.

A language module offers `write(outline, level, rng) -> str`; the plan of what to say
(`outline.py`) is shared by all languages.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.demo.grammar import en
from trainer.demo.grammar.outline import LEVELS, Mention, Outline, outline
from trainer.demo.scenes import Scene

__all__ = ["LANGUAGES", "LEVELS", "Mention", "caption"]

_WRITERS: dict[str, Callable[[Outline, str, np.random.Generator], str]] = {"en": en.write}
LANGUAGES: tuple[str, ...] = tuple(_WRITERS)


def caption(
    scene: Scene,
    level: str,
    language: str,
    rng: np.random.Generator,
    mention: Mention | None = None,
) -> str:
    """Describe a scene at one of LEVELS in one of LANGUAGES, in a randomly chosen phrasing.

    `mention` fixes which properties are stated; by default the level's own habits decide.
    Raises ValueError for an unknown level or language.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; allowed are {', '.join(LEVELS)}")
    if language not in _WRITERS:
        raise ValueError(f"language is {language!r}; allowed are {', '.join(LANGUAGES)}")
    return _WRITERS[language](outline(scene, level, rng, mention), level, rng)
