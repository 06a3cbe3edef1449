"""The body of `POST /generate`: what it takes, and the checks before it becomes a job.

Every field's description says what is allowed; the same words make the refusal, so a caller reads
one sentence that names the field, the allowed values and what came instead.
"""

import difflib
import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from server.errors import InvalidRequest
from server.protocol import JobSpec, ModelInfo, OutputFormat, Priority

MAX_TEXT = 4096
MAX_IMAGES = 8
MAX_SEED = 2**53 - 9  # image k of a job uses seed + k, and 2**53 - 1 is the last exact JSON integer
MAX_SIGMAS = 1000
MIN_SIGMA_STEP = 1e-5
MAX_PANEL_TEXT = 100
MAX_LORAS = 8
MAX_LORA_NAME = 100
MAX_LORA_SCALE = 10
MAX_DEADLINE_S = 24 * 3600
MAX_WEBHOOK_URL = 2048
MAX_METADATA_ENTRIES = 16
MAX_METADATA_TEXT = 512
MAX_UNKNOWN = 8  # unknown fields that an answer names: finding the nearest name takes time

Body = TypeVar("Body", bound=BaseModel)

SCHEDULE = ("num_inference_steps", "shift", "time_grid")  # what sigmas replaces

# Names other servers use for our fields; a plain nearest-spelling search would miss them.
_OTHER_NAMES = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "n": "num_images",
    "batch_size": "num_images",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
    "text": "prompt",
    "size": "width",
    "format": "output_format",
    "scheduler": "sampler",
}


class InvalidFields(InvalidRequest):
    """One or more fields are wrong; `fields` holds (name, sentence) pairs, `detail` the first."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        super().__init__(fields[0][1])
        self.fields = fields


class PanelBody(BaseModel):
    """The slots of the template `panel`: what is drawn beside the picture, and in which half."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    position: Literal["lower half", "upper half", "left half", "right half"] = "lower half"
    content: str = Field("depth map", min_length=1, max_length=MAX_PANEL_TEXT)


class LoraBody(BaseModel):
    """A LoRA by its name, and the factor its change is multiplied by."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    name: str = Field(min_length=1, max_length=MAX_LORA_NAME)
    scale: float = Field(1.0, ge=-MAX_LORA_SCALE, le=MAX_LORA_SCALE)


_Scalar = Annotated[str, Field(max_length=MAX_METADATA_TEXT)] | int | float | bool | None
_Threshold = Annotated[float, Field(ge=0, le=10)]
_MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]


class GenerateBody(BaseModel):
    """The body of `POST /generate`. A missing field comes from the preset, then the checkpoint."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_TEXT,
        description=f"a text of 1 to {MAX_TEXT} characters that is not blank",
        examples=["a red circle above a blue square"],
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_TEXT, description=f"a text of at most {MAX_TEXT} characters"
    )
    system_prompt: str | None = Field(
        None,
        max_length=MAX_TEXT,
        description=f"the name of a template, or a text of at most {MAX_TEXT} characters",
    )
    negative_template: bool | None = Field(
        None, description="true or false: whether the system prompt precedes negative_prompt too"
    )
    panel: PanelBody | None = Field(
        None,
        description="an object with position ('lower half', 'upper half', 'left half' or "
        f"'right half') and content (a text of 1 to {MAX_PANEL_TEXT} characters), without "
        "another system_prompt",
    )
    model: str | None = Field(None, description="the name of a served model")
    width: int | None = Field(
        None, ge=16, multiple_of=16, description="a whole number of pixels, a multiple of 16"
    )
    height: int | None = Field(
        None, ge=16, multiple_of=16, description="a whole number of pixels, a multiple of 16"
    )
    num_images: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description=f"a whole number from 1 to {MAX_IMAGES}"
    )
    num_inference_steps: int | None = Field(
        None, ge=1, description="a whole number of at least 1, up to what the model allows"
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=50, description="a number from 0 to 50 (guidance is off up to 1)"
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED}"
    )
    sampler: Literal["euler", "midpoint", "dpm"] | None = Field(
        None, description="'euler', 'midpoint' or 'dpm'"
    )
    shift: float | None = Field(
        None, gt=0, le=100, description="a number greater than 0 and at most 100"
    )
    time_grid: Literal["diffusers", "official"] | None = Field(
        None, description="'diffusers' or 'official', without sampler 'dpm'"
    )
    sigmas: list[float] | None = Field(
        None,
        min_length=1,
        max_length=MAX_SIGMAS,
        description=f"a list of 1 to {MAX_SIGMAS} numbers, the first at most 1, each at least "
        f"{MIN_SIGMA_STEP:g} below the one before and the last that much above 0, without "
        "num_inference_steps, shift and time_grid",
    )
    cfg_trunc_ratio: float | None = Field(
        None, ge=0, le=1, description="a number from 0 to 1, without cfg_trunc_t"
    )
    cfg_trunc_t: float | None = Field(
        None, ge=0, le=1, description="a number from 0 to 1, without cfg_trunc_ratio"
    )
    cfg_renorm: Literal["none", "global", "row"] | None = Field(
        None, description="'none', 'global' or 'row'"
    )
    cfg_renorm_scale: float | None = Field(
        None, gt=0, le=10, description="a number greater than 0 and at most 10"
    )
    cache: Literal["off", "balanced", "fast"] | _Threshold | None = Field(
        None, description="'off', 'balanced', 'fast' or a number from 0 to 10"
    )
    preset: str | None = Field(None, description="the name of a preset of the model")
    loras: list[LoraBody] | None = Field(
        None,
        max_length=MAX_LORAS,
        description=f"a list of at most {MAX_LORAS} objects with different name (of a LoRA that "
        f"GET /presets lists) and scale (a number from -{MAX_LORA_SCALE} to {MAX_LORA_SCALE})",
    )
    output_format: OutputFormat | None = Field(None, description="'png', 'jpeg' or 'webp'")
    quality: int | None = Field(
        None, ge=1, le=100, description="a whole number from 1 to 100 (for jpeg and webp)"
    )
    embed_parameters: bool | None = Field(
        None, description="true or false: whether the file says how it was made (true)"
    )
    priority: Priority | None = Field(None, description="'low', 'normal' or 'high'")
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        description=f"a number of seconds above 0, up to {MAX_DEADLINE_S}",
    )
    webhook_url: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_WEBHOOK_URL,
        description=f"an http or https URL of at most {MAX_WEBHOOK_URL} characters that is told of "
        "the job's end, at a public address",
    )
    metadata: dict[_MetadataKey, _Scalar] | None = Field(
        None,
        max_length=MAX_METADATA_ENTRIES,
        description=f"an object of at most {MAX_METADATA_ENTRIES} entries whose names have 1 to 64 "
        f"characters and whose values are numbers, booleans or texts of at most "
        f"{MAX_METADATA_TEXT} characters",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if not self.prompt.strip():
            raise _field_error("prompt", _must_be(GenerateBody, "prompt", self.prompt))
        for name in ("prompt", "negative_prompt", "system_prompt"):
            if "\0" in (getattr(self, name) or ""):
                raise _field_error(name, f"{name} must not contain a NUL character")
        if self.panel is not None and "\0" in self.panel.content:
            raise _field_error("panel", "panel must not contain a NUL character")
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.cfg_trunc_ratio is not None and self.cfg_trunc_t is not None:
            raise _field_error(
                "cfg_trunc_t", "cfg_trunc_t and cfg_trunc_ratio say the same thing: give only one"
            )
        if self.panel is not None and self.system_prompt not in (None, "panel"):
            raise _field_error("panel", "panel fills the template 'panel': leave system_prompt out")
        names = [lora.name for lora in self.loras or ()]
        if len(set(names)) < len(names):
            sentence = "loras must name each LoRA once"
            raise _field_error("loras", f"{sentence}, got {shown(names)}")
        return self

    @model_validator(mode="after")
    def _check_sigmas(self) -> Self:
        if self.sigmas is None:
            return self
        for name in SCHEDULE:
            if getattr(self, name) is not None:
                sentence = f"{name} has no say beside sigmas, the schedule itself: give only one"
                raise _field_error(name, sentence)
        falls = all(a - b > MIN_SIGMA_STEP / 2 for a, b in pairwise((*self.sigmas, 0.0)))
        if self.sigmas[0] > 1 or not falls:
            raise _field_error("sigmas", _must_be(GenerateBody, "sigmas", self.sigmas))
        return self


def _field_error(field: str, sentence: str) -> PydanticCustomError:
    return PydanticCustomError("field", "{sentence}", {"field": field, "sentence": sentence})


def printable(text: str, limit: int = 60) -> str:
    """Return `text` shortened to `limit` characters, with nothing that UTF-8 cannot carry."""
    if len(text) > limit:
        text = text[:limit] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """The offending value as JSON, short enough for a sentence."""
    if isinstance(value, str) and len(value) > 60:
        return f"a text of {len(value)} characters"
    try:
        return printable(json.dumps(value, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):
        return f"a value of type {type(value).__name__}"


def _must_be(model: type[BaseModel], field: str, value: Any) -> str:
    return f"{field} must be {model.model_fields[field].description}, got {shown(value)}"


def _unknown_field(model: type[BaseModel], name: str) -> str:
    known = list(model.model_fields)
    lowered = name.lower()
    other = _OTHER_NAMES.get(lowered)
    near = [other] if other in known else difflib.get_close_matches(lowered, known, 1, cutoff=0.5)
    if near:
        return f"unknown field '{printable(name)}'; did you mean '{near[0]}'?"
    return f"unknown field '{printable(name)}'; known are {', '.join(known)}"


def _sentence(model: type[BaseModel], error: Any, value: dict[str, Any]) -> tuple[str, str]:
    """Turn one pydantic error into (field, sentence)."""
    if error["type"] == "field":
        return error["ctx"]["field"], error["ctx"]["sentence"]
    field = str(error["loc"][0])
    if error["type"] == "missing":
        return field, f"{field} is required: {model.model_fields[field].description}"
    if error["type"] == "string_unicode":
        return field, f"{field} must not contain lone surrogates"
    return field, _must_be(model, field, value[field])


def parse_body(model: type[Body], value: Any) -> Body:
    """Check a decoded JSON body against a model whose fields' descriptions say what is allowed.

    Raises InvalidRequest (InvalidFields where fields are to blame).
    """
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {shown(value)}")
    # Unknown names come first: a misspelt field is better named than reported as missing. They
    # are taken out here because pydantic stops at a name that is not valid Unicode.
    unknown = [name for name in value if name not in model.model_fields]
    wrong = {printable(name): _unknown_field(model, name) for name in unknown[:MAX_UNKNOWN]}
    known = {name: value[name] for name in model.model_fields if name in value}
    try:
        body = model.model_validate(known)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            field, sentence = _sentence(model, item, value)
            wrong.setdefault(field, sentence)
    if wrong:
        raise InvalidFields(list(wrong.items()))
    return body


def parse_generate(value: Any) -> GenerateBody:
    """Check a body of `POST /generate` against everything that does not depend on the model."""
    return parse_body(GenerateBody, value)


def resolved(body: GenerateBody, info: ModelInfo, field: str) -> Any:
    """What a job will use for a setting: the body's value, else the preset's, the checkpoint's."""
    preset = info.presets.get(body.preset or "", {})
    for value in (getattr(body, field), preset.get(field), info.defaults.get(field)):
        if value is not None:
            return value
    return None


def check_against_model(body: GenerateBody, info: ModelInfo) -> None:
    """Check what depends on the checkpoint: sizes, steps, presets. Raises InvalidFields."""
    wrong: list[tuple[str, str]] = []
    for field in ("width", "height"):
        size = getattr(body, field)
        if size is None:
            continue
        if not info.min_size <= size <= info.max_size or size % info.size_multiple:
            allowed = f"a multiple of {info.size_multiple} from {info.min_size} to {info.max_size}"
            wrong.append((field, f"{field} must be {allowed}, got {shown(size)}"))
    steps = body.num_inference_steps
    if steps is not None and steps > info.max_steps:
        sentence = f"num_inference_steps must be a whole number from 1 to {info.max_steps}"
        wrong.append(("num_inference_steps", f"{sentence}, got {shown(steps)}"))
    wrong += _check_schedule(body, info)
    if body.preset is not None and body.preset not in info.presets:
        offered = ", ".join(sorted(info.presets)) or "none"
        sentence = f"preset must be one that {info.name} has ({offered}), got {shown(body.preset)}"
        wrong.append(("preset", sentence))
    wrong += _check_loras(body, info)
    if wrong:
        raise InvalidFields(wrong)


def _check_loras(body: GenerateBody, info: ModelInfo) -> list[tuple[str, str]]:
    """The first LoRA that is not on offer, as (field, sentence)."""
    for lora in body.loras or ():
        if lora.name not in info.loras:
            offered = ", ".join(info.loras) or "none"
            sentence = f"loras must name those that {info.name} has ({offered})"
            return [("loras", f"{sentence}, got {shown(lora.name)}")]
    return []


def resolved_sigmas(body: GenerateBody, info: ModelInfo) -> Sequence[float] | None:
    """The sigmas a job will use, or None: then its schedule comes from a step count."""
    own = {name: getattr(body, name) for name in ("sigmas", *SCHEDULE)}
    for source in (own, info.presets.get(body.preset or "", {}), info.defaults):
        if source.get("sigmas") is not None:
            sigmas: Sequence[float] = source["sigmas"]
            return sigmas
        if any(source.get(name) is not None for name in SCHEDULE):
            return None
    return None


def _check_schedule(body: GenerateBody, info: ModelInfo) -> list[tuple[str, str]]:
    """What is wrong with solver and schedule together, as (field, sentence)."""
    if body.sigmas is not None and len(body.sigmas) > info.max_steps:
        sentence = f"sigmas must be at most {info.max_steps} numbers, got {len(body.sigmas)}"
        return [("sigmas", sentence)]
    if resolved(body, info, "sampler") == "dpm":
        sentence = "time_grid has no say with sampler 'dpm', which has its own: leave it out"
        return [("time_grid", sentence)] if body.time_grid is not None else []
    grid, steps = (resolved(body, info, name) for name in ("time_grid", "num_inference_steps"))
    if grid == "official" and steps == 1 and resolved_sigmas(body, info) is None:
        sentence = "num_inference_steps must be at least 2 with time_grid 'official', got 1"
        return [("num_inference_steps", sentence)]
    return []


def job_spec(
    body: GenerateBody, *, seed: int, output_format: OutputFormat, partial_images: int = 0
) -> JobSpec:
    """The job of a checked body; `seed` and `output_format` fill what the body left out."""
    fields = body.model_dump(
        exclude={"priority", "deadline_s", "webhook_url", "seed", "output_format"},
        exclude_none=True,
    )
    return JobSpec(**fields, seed=seed, output_format=output_format, partial_images=partial_images)
