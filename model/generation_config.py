"""`generation_config.json`: what a checkpoint wants by default, what it allows, its presets.

A missing value of a request comes from, in this order: the preset it names, the checkpoint's
defaults, diffusers' own defaults (with the shift of the scheduler's config and the size the
checkpoint was trained at). The file is optional and looks like

    {"defaults": {"width": 128, "height": 128, "num_inference_steps": 20},
     "limits": {"min_size": 64, "max_size": 128, "max_steps": 50},
     "presets": {"quick": {"num_inference_steps": 8}}}

Sizes and step limits are for the service to enforce; the pipeline takes what the network can do.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointError, read_json
from model.request import (
    MAX_SEED,
    SETTINGS,
    SIZE_MULTIPLE,
    GenerationRequest,
    ResolvedRequest,
    check_settings,
    nearest,
)

FILE_NAME = "generation_config.json"
_SECTIONS = ("defaults", "limits", "presets")
_TRUNCATIONS = ("cfg_trunc_ratio", "cfg_trunc_t")

# What diffusers' Lumina2Pipeline does when asked for nothing in particular.
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "system_prompt": "real",
    "num_inference_steps": 30,
    "guidance_scale": 4.0,
    "sampler": "euler",
    "time_grid": "diffusers",
    "cfg_renorm": "row",
    "cfg_renorm_scale": 1.0,
}


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
            ValueError: the preset is not one of this checkpoint's.
        """
        settings = dict(self.defaults)
        if request.preset is not None:
            settings = _overlay(settings, self._preset(request.preset))
        given = {name: getattr(request, name) for name in SETTINGS}
        settings = _overlay(settings, {k: v for k, v in given.items() if v is not None})
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        settings = dict.fromkeys(_TRUNCATIONS) | settings
        return ResolvedRequest(
            prompt=request.prompt,
            num_images=request.num_images,
            seed=seed,
            preset=request.preset,
            **settings,
        )

    def _preset(self, name: str) -> Mapping[str, Any]:
        if name not in self.presets:
            offer = ", ".join(repr(known) for known in self.presets) or "none"
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
    base = {**_DIFFUSERS_DEFAULTS, "shift": shift, "width": trained_size, "height": trained_size}
    _check("defaults", sections["defaults"])
    defaults = _overlay(base, sections["defaults"])
    for preset, settings in sections["presets"].items():
        _check(f"preset {preset!r}", settings)
    limits = _limits(sections["limits"], trained_size, size_multiple)
    for side in ("width", "height"):
        if not limits.min_size <= defaults[side] <= limits.max_size:
            raise CheckpointError(
                f"{FILE_NAME}: the default {side} {defaults[side]} is outside the limits "
                f"{limits.min_size} to {limits.max_size}"
            )
    return GenerationConfig(defaults=defaults, limits=limits, presets=sections["presets"])


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `above` over those of `below`; one truncation rule replaces the other."""
    if any(name in above for name in _TRUNCATIONS):
        below = {name: value for name, value in below.items() if name not in _TRUNCATIONS}
    return {**below, **above}


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
