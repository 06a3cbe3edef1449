"""The two dialects of Lumina-Image 2.0 as presets that every checkpoint has.

A preset fixes how a picture is sampled and guided. What belongs to the checkpoint stays the
checkpoint's: its sizes, its system prompt, its negative prompt.

- `diffusers`: what `Lumina2Pipeline` does with the folder when asked for a prompt and nothing else,
  hence with the shift of the folder's scheduler config;
- `official`: the inference script of the official repository (midpoint on 18 grid points, shift 6)
  with the renormalisation and the truncation that its demo sets and the paper adopts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OFFICIAL: Mapping[str, Any] = {
    "sampler": "midpoint",
    "time_grid": "official",
    "num_inference_steps": 18,
    "shift": 6.0,
    "guidance_scale": 4.0,
    "cfg_trunc_t": 0.25,
    "cfg_renorm": "global",
    "cfg_renorm_scale": 1.0,
    "negative_template": True,
    "cache": "off",
}
DIFFUSERS: Mapping[str, Any] = {
    "sampler": "euler",
    "time_grid": "diffusers",
    "num_inference_steps": 30,
    "guidance_scale": 4.0,
    "cfg_trunc_ratio": 1.0,
    "cfg_renorm": "row",
    "cfg_renorm_scale": 1.0,
    "negative_template": False,
    "cache": "off",
}
BUILT_IN_NAMES = ("official", "diffusers")


def built_in_presets(*, shift: float, max_steps: int) -> dict[str, dict[str, Any]]:
    """The built-in presets as one checkpoint offers them.

    Args:
        shift: of the folder's scheduler config; `official` has its own.
        max_steps: of the checkpoint; neither preset asks for more.
    """
    presets = dict(
        zip(BUILT_IN_NAMES, (dict(OFFICIAL), {**DIFFUSERS, "shift": shift}), strict=True)
    )
    for settings in presets.values():
        settings["num_inference_steps"] = min(settings["num_inference_steps"], max_steps)
    return presets
