"""`generation_config.json`: what a checkpoint wants by default, what it allows, its presets.

A missing value of a request comes from, in this order: the preset it names, the checkpoint's
defaults, diffusers' own defaults (with the shift of the scheduler's config and the size the
checkpoint was trained at). The file is optional and looks like

    {"defaults": {"width": 128, "height": 128, "num_inference_steps": 20},
     "limits": {"min_size": 64, "max_size": 128, "max_steps": 50},
     "presets": {"fast": {"num_inference_steps": 8}}}

The presets of `model.presets` are there without being listed, and their names are taken. What the
file asks for by default or in a preset must be within its own limits. Limits of requests are for
the service to enforce; the pipeline takes what the network can do.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointError, read_json
from model.presets import BUILT_IN_NAMES, built_in_presets
from model.request import (
    MAX_SEED,
    SCHEDULE,
    SIZE_MULTIPLE,
    TRUNCATIONS,
    GenerationRequest,
    ResolvedRequest,
    check_settings,
    lora_choices,
    nearest,
    own_grid_sentence,
)
from model.samplers import OWN_GRID
from model.templates import PANEL_TEMPLATE, Panel

FILE_NAME = "generation_config.json"
_SECTIONS = ("defaults", "limits", "presets")


@dataclass(frozen=True)
class Limits:
    """What a service may promise of this checkpoint.

    Attributes:
        min_size: smallest width and height, pixels.
        max_size: largest width and height, pixels.
        max_steps: most `num_inference_steps`.
        size_multiple: width and height are multiples of this, pixels.
    """

    min_size: int
    max_size: int
    max_steps: int = 100
    size_multiple: int = SIZE_MULTIPLE


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults, limits and presets of one checkpoint.

    Attributes:
        defaults: every setting that has a default, by its request field name.
        limits: see `Limits`.
        presets: name -> the settings it fixes.
    """

    defaults: Mapping[str, Any]
    limits: Limits
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """Fill what the request left open; draws a seed where none is given.

        Raises:
            ValueError: the preset is not one of this checkpoint's, or its solver has no use for
                the time grid asked for.
        """
        settings = dict(self.defaults)
        if request.preset is not None:
            settings = _overlay(settings, self._preset(request.preset))
        settings = _overlay(settings, request.settings)
        if settings["sampler"] == OWN_GRID and request.time_grid is not None:
            raise ValueError(own_grid_sentence(request.time_grid))
        return ResolvedRequest(
            prompt=request.prompt,
            num_images=request.num_images,
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            preset=request.preset,
            loras=lora_choices(request),
            **_settled(settings),
        )

    def _preset(self, name: str) -> Mapping[str, Any]:
        if name not in self.presets:
            offer = ", ".join(repr(known) for known in self.presets)
            raise ValueError(f"preset {name[:60]!r} is not allowed: this checkpoint offers {offer}")
        return self.presets[name]


def load_generation_config(
    folder: Path, *, shift: float, trained_size: int, size_multiple: int = SIZE_MULTIPLE
) -> GenerationConfig:
    """Read a checkpoint folder's `generation_config.json`, or make one up from the model's configs.

    Args:
        folder: the checkpoint folder (holds `model_index.json`).
        shift: of `scheduler/scheduler_config.json`.
        trained_size: width and height the network was trained at, pixels.
        size_multiple: smallest step of width and height the network can do, pixels.

    Raises:
        CheckpointError: one line naming the file, the entry and what is allowed.
    """
    path = folder / FILE_NAME
    content = read_json(path) if path.exists() else {}
    sections = {name: _section(content, name) for name in _SECTIONS}
    for name in content:
        if name not in _SECTIONS:
            raise CheckpointError(f"{FILE_NAME}: unknown key {name!r}{nearest(name, _SECTIONS)}")
    limits = _limits(sections["limits"], trained_size, size_multiple)
    built_in = built_in_presets(shift=shift, max_steps=limits.max_steps)
    _check("defaults", sections["defaults"])
    defaults = _overlay(_base_defaults(built_in["diffusers"], trained_size), sections["defaults"])
    _check_limits("the default", defaults, limits)
    for preset, settings in sections["presets"].items():
        if preset in BUILT_IN_NAMES:
            raise CheckpointError(
                f"{FILE_NAME}: preset {preset!r} is built in: give yours another name"
            )
        _check(f"preset {preset!r}", settings)
        _check_limits(f"preset {preset!r}:", settings, limits)
    presets = built_in | sections["presets"]
    return GenerationConfig(defaults=defaults, limits=limits, presets=presets)


def _base_defaults(diffusers: Mapping[str, Any], trained_size: int) -> dict[str, Any]:
    """What holds where the file says nothing: diffusers' way, at the size of the training."""
    return {
        "negative_prompt": "",
        "system_prompt": "real",
        **{name: value for name, value in diffusers.items() if name not in TRUNCATIONS},
        "width": trained_size,
        "height": trained_size,
    }


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `above` over those of `below`; of two ways to say a thing, the upper counts."""
    hidden: set[str] = set()
    if any(name in above for name in TRUNCATIONS):
        hidden.update(TRUNCATIONS)
    if any(name in above for name in SCHEDULE):
        hidden.add("sigmas")
    kept = {name: value for name, value in below.items() if name not in hidden}
    template = {"system_prompt": PANEL_TEMPLATE} if "panel" in above else {}
    return {**kept, **template, **above}


def _settled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a `ResolvedRequest`: None where another setting takes its say away."""
    settled = dict.fromkeys((*TRUNCATIONS, "sigmas", "panel")) | dict(settings)
    if settled["sigmas"] is not None:
        settled.update(dict.fromkeys(SCHEDULE), sigmas=tuple(map(float, settled["sigmas"])))
    if settled["sampler"] == OWN_GRID:
        settled["time_grid"] = None
    panel = settled["panel"] or Panel()
    panel = panel if isinstance(panel, Panel) else Panel(**panel)
    settled["panel"] = panel if settled["system_prompt"] == PANEL_TEMPLATE else None
    return settled


def _check_limits(where: str, settings: Mapping[str, Any], limits: Limits) -> None:
    """Refuse a default or preset that the service would not allow in a request."""
    step = limits.size_multiple
    for side in ("width", "height"):
        size = settings.get(side, limits.min_size)
        if not limits.min_size <= size <= limits.max_size:
            raise CheckpointError(
                f"{FILE_NAME}: {where} {side} {size} is outside the limits "
                f"{limits.min_size} to {limits.max_size}"
            )
        if side in settings and size % step:
            raise CheckpointError(f"{FILE_NAME}: {where} {side} {size} is no multiple of {step}")
    steps = {
        "num_inference_steps": settings.get("num_inference_steps", 1),
        "number of sigmas": len(settings.get("sigmas", ())),
    }
    for name, count in steps.items():
        if count > limits.max_steps:
            raise CheckpointError(
                f"{FILE_NAME}: {where} {name} {count} is above the limit max_steps "
                f"{limits.max_steps}"
            )


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name, {})
    if not isinstance(section, dict):
        raise CheckpointError(f"{FILE_NAME}: {name} must be a JSON object")
    return section


def _check(where: str, settings: object) -> None:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{FILE_NAME}: {where} must be a JSON object")
    try:
        check_settings(settings)
    except ValueError as error:
        raise CheckpointError(f"{FILE_NAME}: {where}: {error}") from None


def _limits(section: Mapping[str, Any], trained_size: int, size_multiple: int) -> Limits:
    known = [f.name for f in fields(Limits)]
    for name, value in section.items():
        if name not in known:
            raise CheckpointError(
                f"{FILE_NAME}: limits: unknown key {name!r}{nearest(name, known)}"
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{FILE_NAME}: limits: {name} {value!r} is not allowed: give a positive integer"
            )
    limits = Limits(
        **{
            "min_size": size_multiple,
            "max_size": 2 * trained_size,
            "size_multiple": size_multiple,
            **section,
        }
    )
    if limits.size_multiple % size_multiple:
        raise CheckpointError(
            f"{FILE_NAME}: limits: size_multiple {limits.size_multiple} is not allowed: "
            f"give a multiple of {size_multiple}"
        )
    if limits.min_size > limits.max_size:
        raise CheckpointError(
            f"{FILE_NAME}: limits: min_size {limits.min_size} is above max_size {limits.max_size}"
        )
    return limits
