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
from itertools import pairwise
from typing import Any

from model.samplers import OWN_GRID, SAMPLERS, TIME_GRIDS
from model.templates import PANEL_POSITIONS, PANEL_TEMPLATE, Panel

MAX_TEXT = 4096  # characters of a prompt
MAX_IMAGES = 8
MAX_SEED = 2**53 - 9  # image k uses seed + k, and JSON readers are exact up to 2**53 - 1
SIZE_MULTIPLE = 16
MAX_SIDE = 8192
CFG_RENORMS = ("none", "global", "row")
CACHE_PRESETS = ("balanced", "fast")  # skip schedules; what each means is in teacache.json
MAX_CACHE_THRESHOLD = 10.0
MAX_STEPS = 1000
MIN_SIGMA_STEP = 1e-5  # nearer sigmas are one sigma in float32, and solvers divide by the distance
MAX_PANEL_TEXT = 100  # characters
MAX_LORAS = 8  # of one request
MAX_LORA_NAME = 100  # characters
MAX_LORA_SCALE = 10.0

# Settings that say the same thing in two ways: where one is given, the others have no say.
TRUNCATIONS = ("cfg_trunc_ratio", "cfg_trunc_t")
SCHEDULE = ("num_inference_steps", "shift", "time_grid")  # what `sigmas` replaces


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA that a request names, and the factor its change is multiplied by."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One request for `num_images` pictures of one prompt; None = as the checkpoint has it.

    Raises:
        ValueError: one sentence naming the field, its value and what is allowed.

    Attributes:
        prompt: 1..4096 characters.
        negative_prompt: text of the uncond branch; "" is the bare empty string.
        negative_template: whether a negative prompt that is not empty gets the system prompt too.
        system_prompt: a name of `model.templates.TEMPLATE_NAMES`, or free text.
        panel: slots of the template `panel`, which it selects; a `Panel` or a mapping of its
            fields.
        width: pixels, multiple of 16.
        height: pixels, multiple of 16.
        num_images: 1..8; image k is drawn from seed + k.
        num_inference_steps: in the meaning of `time_grid`.
        guidance_scale: CFG weight; CFG is on above 1.
        seed: 0..2**53 - 9; None draws one.
        sampler: a key of `model.samplers.SAMPLERS`.
        shift: resolution shift of the schedule.
        time_grid: `diffusers` or `official`; not with sampler `dpm`, which has a grid of its own.
        sigmas: the schedule itself, as it is (no shift): descending noise fractions above 0, the
            last interval ends at 0; excludes num_inference_steps, shift and time_grid.
        cfg_trunc_ratio: guided while (interval + 1) / num_intervals <= ratio.
        cfg_trunc_t: guided while timestep < t; excludes `cfg_trunc_ratio`.
        cfg_renorm: `none`, `global` or `row`.
        cfg_renorm_scale: the official rho of `global`.
        cache: `off`, a preset of skipped steps (`balanced` or `fast`), or a number: skip while the
            estimated change of the joint blocks' output stays below it.
        preset: a preset name of the checkpoint.
        loras: up to 8 different LoRAs of those on offer, in the order of application; each a
            `LoraChoice` or a mapping of its fields.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str | None = None
    negative_template: bool | None = None
    system_prompt: str | None = None
    panel: Panel | Mapping[str, str] | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    sampler: str | None = None
    shift: float | None = None
    time_grid: str | None = None
    sigmas: Sequence[float] | None = None
    cfg_trunc_ratio: float | None = None
    cfg_trunc_t: float | None = None
    cfg_renorm: str | None = None
    cfg_renorm_scale: float | None = None
    cache: str | float | None = None
    preset: str | None = None
    loras: Sequence[LoraChoice | Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name in ("prompt", "num_images"):
                check_field(field.name, value)
        check_together(self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that this request fixes itself, by field name."""
        given = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with nothing left to decide; fields as in `GenerationRequest`.

    Settings without a say are None: those of the schedule beside `sigmas`, `time_grid` with a
    solver that has its own grid, `panel` without its template.
    """

    prompt: str
    negative_prompt: str
    negative_template: bool
    system_prompt: str
    panel: Panel | None
    width: int
    height: int
    num_images: int
    num_inference_steps: int | None
    guidance_scale: float
    seed: int
    sampler: str
    shift: float | None
    time_grid: str | None
    sigmas: tuple[float, ...] | None
    cfg_trunc_ratio: float | None
    cfg_trunc_t: float | None
    cfg_renorm: str
    cfg_renorm_scale: float
    cache: str | float
    preset: str | None
    loras: tuple[LoraChoice, ...] | None


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
    check_together(settings)


def check_together(settings: Mapping[str, Any]) -> None:
    """Check settings of one source (a request, a preset, a file's defaults) against each other.

    Raises:
        ValueError: one sentence naming two settings that contradict each other.
    """
    if all(name in settings for name in TRUNCATIONS):
        raise ValueError(
            "cfg_trunc_ratio and cfg_trunc_t are two rules for the same thing: give one of them"
        )
    for name in SCHEDULE:
        if "sigmas" in settings and name in settings:
            raise ValueError(f"{name} has no say beside sigmas, the schedule itself: give one")
    if settings.get("sampler") == OWN_GRID and "time_grid" in settings:
        raise ValueError(own_grid_sentence(settings["time_grid"]))
    if "panel" in settings and settings.get("system_prompt", PANEL_TEMPLATE) != PANEL_TEMPLATE:
        raise ValueError(
            f"panel fills the template {PANEL_TEMPLATE!r}: leave system_prompt out, or give that"
        )


def own_grid_sentence(time_grid: str) -> str:
    """Why a time grid is refused beside a solver that has its own."""
    return (
        f"time_grid {time_grid!r} is not allowed with sampler {OWN_GRID!r}, "
        "which has a grid of its own: leave it out"
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean ...?)' for a misspelt name, or nothing."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# A rule returns what is allowed when the value is not, else None.
_Rule = Callable[[object], str | None]


def _text(shortest: int, longest: int = MAX_TEXT) -> _Rule:
    allowed = f"text of {shortest} to {longest} characters"

    def rule(value: object) -> str | None:
        if not isinstance(value, str) or not shortest <= len(value) <= longest:
            return allowed
        # What bytes that are no UTF-8 become on a command line; no tokenizer can read them.
        lone = any("\ud800" <= letter <= "\udfff" for letter in value)
        return "text without lone surrogates" if lone else None

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


def _flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _sigmas(value: object) -> str | None:
    allowed = (
        f"a list of 1 to {MAX_STEPS} numbers, the first at most 1, each at least "
        f"{MIN_SIGMA_STEP:g} below the one before and the last that much above 0"
    )
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_STEPS:
        return allowed
    number = _number(0.0, 1.0)
    if any(number(sigma) is not None for sigma in value):
        return allowed
    # Half a step of slack: 0.3 - 0.29999 is a little less than 1e-5 in binary.
    falls = all(a - b > MIN_SIGMA_STEP / 2 for a, b in pairwise((*value, 0.0)))
    return None if falls else allowed


def _cache(value: object) -> str | None:
    names = ("off", *CACHE_PRESETS)
    number = _number(0.0, MAX_CACHE_THRESHOLD)
    if value in names or (not isinstance(value, str) and number(value) is None):
        return None
    return f"{', '.join(map(repr, names))} or {number(None)}"


def _panel(value: object) -> str | None:
    positions = ", ".join(repr(position) for position in PANEL_POSITIONS)
    allowed = (
        f"'position' (one of {positions}) and 'content' (text of 1 to {MAX_PANEL_TEXT} characters)"
    )
    slots = vars(value) if isinstance(value, Panel) else value
    if not isinstance(slots, Mapping) or not slots.keys() <= {"position", "content"}:
        return allowed
    panel = {**vars(Panel()), **slots}
    known = panel["position"] in tuple(PANEL_POSITIONS)
    return None if known and _text(1, MAX_PANEL_TEXT)(panel["content"]) is None else allowed


def _loras(value: object) -> str | None:
    allowed = (
        f"a list of at most {MAX_LORAS} different LoRAs, each with 'name' (text of 1 to "
        f"{MAX_LORA_NAME} characters) and 'scale' (a number from -{MAX_LORA_SCALE:g} to "
        f"{MAX_LORA_SCALE:g})"
    )
    if not isinstance(value, list | tuple) or len(value) > MAX_LORAS:
        return allowed
    names = set()
    for each in value:
        entry = vars(each) if isinstance(each, LoraChoice) else each
        if not isinstance(entry, Mapping) or not {"name"} <= entry.keys() <= {"name", "scale"}:
            return allowed
        name, scale = entry["name"], entry.get("scale", 1.0)
        good = _text(1, MAX_LORA_NAME)(name) is None
        if not good or _number(-MAX_LORA_SCALE, MAX_LORA_SCALE)(scale) is not None:
            return allowed
        names.add(name)
    return None if len(names) == len(value) else allowed


def lora_choices(request: GenerationRequest) -> tuple[LoraChoice, ...] | None:
    """The LoRAs of a checked request; None where it names none."""
    entries = [e if isinstance(e, LoraChoice) else LoraChoice(**e) for e in request.loras or ()]
    return tuple(entries) or None


def _shown(value: object) -> str:
    """A value for an error message: never long, never several lines."""
    if isinstance(value, str) and len(value) > 60:
        return f"of {len(value)} characters"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_RULES: dict[str, _Rule] = {
    "prompt": _text(1),
    "negative_prompt": _text(0),
    "negative_template": _flag,
    "system_prompt": _text(0),
    "panel": _panel,
    "width": _integer(SIZE_MULTIPLE, MAX_SIDE, SIZE_MULTIPLE),
    "height": _integer(SIZE_MULTIPLE, MAX_SIDE, SIZE_MULTIPLE),
    "num_images": _integer(1, MAX_IMAGES),
    "num_inference_steps": _integer(1, MAX_STEPS),
    "guidance_scale": _number(0.0, 100.0),
    "seed": _integer(0, MAX_SEED),
    "sampler": _choice(tuple(SAMPLERS)),
    "shift": _number(0.0, 100.0, open_low=True),
    "time_grid": _choice(TIME_GRIDS),
    "sigmas": _sigmas,
    "cfg_trunc_ratio": _number(0.0, 1.0),
    "cfg_trunc_t": _number(0.0, 100.0),
    "cfg_renorm": _choice(CFG_RENORMS),
    "cfg_renorm_scale": _number(0.0, 100.0),
    "cache": _cache,
    "preset": _text(1),
    "loras": _loras,
}

_PER_REQUEST = ("prompt", "num_images", "seed", "preset", "loras")
SETTINGS = tuple(name for name in _RULES if name not in _PER_REQUEST)
