"""What a picture is asked for: the request as given, and the request with every blank filled.

Field names and meanings are those of the HTTP body. `GenerationRequest` leaves open (None) what
the checkpoint decides; `model.generation_config` turns it into a `ResolvedRequest`. Imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from difflib import get_close_matches
from typing import Any

from model.samplers import SAMPLERS, TIME_GRIDS

MAX_TEXT = 4096  # characters of a prompt
MAX_IMAGES = 8
MAX_SEED = 2**53 - 9  # image k uses seed + k, and JSON readers are exact up to 2**53 - 1
SIZE_MULTIPLE = 16
MAX_SIDE = 8192
CFG_RENORMS = ("none", "global", "row")


@dataclass(frozen=True)
class GenerationRequest:
    """One request for `num_images` pictures of one prompt; None = as the checkpoint has it.

    Raises:
        ValueError: one sentence naming the field, its value and what is allowed.

    Attributes:
        prompt: 1..4096 characters.
        negative_prompt: text of the uncond branch; "" is the bare empty string.
        system_prompt: a template name of `model.text_encoder.TEMPLATES`, or free text.
        width: pixels, multiple of 16.
        height: pixels, multiple of 16.
        num_images: 1..8; image k is drawn from seed + k.
        num_inference_steps: in the meaning of `time_grid`.
        guidance_scale: CFG weight; CFG is on above 1.
        seed: 0..2**53 - 9; None draws one.
        sampler: a key of `model.samplers.SAMPLERS`.
        shift: resolution shift of the schedule.
        time_grid: `diffusers` or `official`.
        cfg_trunc_ratio: guided while (step + 1) / num_steps <= ratio.
        cfg_trunc_t: guided while timestep < t; excludes `cfg_trunc_ratio`.
        cfg_renorm: `none`, `global` or `row`.
        cfg_renorm_scale: the official rho of `global`.
        preset: a preset name of the checkpoint.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str | None = None
    system_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    sampler: str | None = None
    shift: float | None = None
    time_grid: str | None = None
    cfg_trunc_ratio: float | None = None
    cfg_trunc_t: float | None = None
    cfg_renorm: str | None = None
    cfg_renorm_scale: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name in ("prompt", "num_images"):
                check_field(field.name, value)
        if self.cfg_trunc_ratio is not None and self.cfg_trunc_t is not None:
            raise ValueError(
                "cfg_trunc_ratio and cfg_trunc_t are two rules for the same thing: give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left to decide; fields as in `GenerationRequest`."""

    prompt: str
    negative_prompt: str
    system_prompt: str
    width: int
    height: int
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    sampler: str
    shift: float
    time_grid: str
    cfg_trunc_ratio: float | None
    cfg_trunc_t: float | None
    cfg_renorm: str
    cfg_renorm_scale: float
    preset: str | None


def check_field(name: str, value: object) -> None:
    """Check one field of a request by its name.

    Raises:
        ValueError: one sentence naming the field, its value and what is allowed.
    """
    assert name in _RULES, name
    allowed = _RULES[name](value)
    if allowed is not None:
        raise ValueError(f"{name} {_shown(value)} is not allowed: give {allowed}")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check a mapping of settings that a checkpoint or preset may fix (no prompt, no seed).

    Raises:
        ValueError: an unknown name (with the nearest known one) or a value that is not allowed.
    """
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"unknown setting {name!r}{nearest(name, SETTINGS)}")
        check_field(name, value)
    if "cfg_trunc_ratio" in settings and "cfg_trunc_t" in settings:
        raise ValueError("cfg_trunc_ratio and cfg_trunc_t exclude each other: keep one of them")


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# A rule returns what is allowed when the value is not, else None.
_Rule = Callable[[object], str | None]


def _text(shortest: int) -> _Rule:
    allowed = f"text of {shortest} to {MAX_TEXT} characters"

    def rule(value: object) -> str | None:
        return None if isinstance(value, str) and shortest <= len(value) <= MAX_TEXT else allowed

    return rule


def _integer(low: int, high: int, multiple: int = 1) -> _Rule:
    kind = "an integer" if multiple == 1 else f"a multiple of {multiple}"
    allowed = f"{kind} from {low} to {high}"

    def rule(value: object) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool):
            inside = low <= value <= high and value % multiple == 0
            return None if inside else allowed
        return allowed

    return rule


def _number(low: float, high: float, *, open_low: bool = False) -> _Rule:
    span = f"above {low:g} and up to {high:g}" if open_low else f"from {low:g} to {high:g}"
    allowed = f"a number {span}"

    def rule(value: object) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            inside = low < value <= high if open_low else low <= value <= high
            return None if inside else allowed
        return allowed

    return rule


def _choice(options: Sequence[str]) -> _Rule:
    allowed = " or ".join(repr(option) for option in options)

    def rule(value: object) -> str | None:
        return None if value in options else allowed

    return rule


def _shown(value: object) -> str:
    """A value for an error message: never long, never several lines."""
    if isinstance(value, str) and len(value) > 60:
        return f"of {len(value)} characters"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_RULES: dict[str, _Rule] = {
    "prompt": _text(1),
    "negative_prompt": _text(0),
    "system_prompt": _text(0),
    "width": _integer(SIZE_MULTIPLE, MAX_SIDE, SIZE_MULTIPLE),
    "height": _integer(SIZE_MULTIPLE, MAX_SIDE, SIZE_MULTIPLE),
    "num_images": _integer(1, MAX_IMAGES),
    "num_inference_steps": _integer(1, 1000),
    "guidance_scale": _number(0.0, 100.0),
    "seed": _integer(0, MAX_SEED),
    "sampler": _choice(tuple(SAMPLERS)),
    "shift": _number(0.0, 100.0, open_low=True),
    "time_grid": _choice(TIME_GRIDS),
    "cfg_trunc_ratio": _number(0.0, 1.0),
    "cfg_trunc_t": _number(0.0, 100.0),
    "cfg_renorm": _choice(CFG_RENORMS),
    "cfg_renorm_scale": _number(0.0, 100.0),
    "preset": _text(1),
}

_PER_REQUEST = ("prompt", "num_images", "seed", "preset")
SETTINGS = tuple(name for name in _RULES if name not in _PER_REQUEST)
