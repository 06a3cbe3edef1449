"""What processes tell each other: job specifications, results, records and model offers.

Small frozen dataclasses and their JSON. They hold plain values only, so that the API and the
workers may be of different versions for the length of a rollout: a reader ignores fields it does
not know and refuses a specification whose `version` it does not know.
"""

import dataclasses
import json
import re
import secrets
import time
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

SPEC_VERSION = 1

JobStatus = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
TERMINAL_STATUSES: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})

Priority = Literal["low", "normal", "high"]
PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")

OutputFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}

PNG_TEXT_KEY = "parameters"  # the text chunk in which a picture says how it was made

DEFAULT_POOL = "default"
DEFAULT_TENANT = "anonymous"

_JOB_ID = re.compile(r"[0-9a-hjkmnp-tv-z]{26}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


class ProtocolError(ValueError):
    """A message that this version cannot read."""


def new_job_id() -> str:
    """Return a fresh job id: 26 url-safe characters that sort by creation time.

    48 bits of milliseconds and 80 random bits, as in a ULID. The clock serves the sort order
    only: nothing else is derived from it.
    """
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return "".join(_ID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def is_job_id(text: str) -> bool:
    """Whether `text` has the form of a job id; anything else never reaches Redis or a path."""
    return _JOB_ID.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether `text` may name a tenant, a pool or a worker (it becomes part of keys and paths)."""
    return _NAME.fullmatch(text) is not None


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


def _adapter(message_type: type[Any]) -> TypeAdapter[Any]:
    if message_type not in _ADAPTERS:
        _ADAPTERS[message_type] = TypeAdapter(message_type)
    return _ADAPTERS[message_type]


class _Message:
    """JSON in both directions for the dataclasses below."""

    def to_json(self) -> str:
        """Return compact JSON with the fields in their order of declaration."""
        # Nested messages through `default`: `dataclasses.asdict` copies everything, and is slow.
        return json.dumps(
            vars(self), default=vars, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote; raises ProtocolError with one sentence."""
        try:
            message: Self = _adapter(cls).validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "(whole message)"
            raise ProtocolError(f"{cls.__name__}: {where}: {first['msg']}") from None
        return message


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSpec(_Message):
    """What to draw. None means: the preset, then the checkpoint, decides. The seed is always set.

    The fields that concern the picture are named as in `model.GenerationRequest`. `partial_images`
    is how many unfinished pictures the caller wants to see of each; `embed_parameters` whether the
    file says how it was made.
    """

    prompt: str
    seed: int
    version: int = SPEC_VERSION
    negative_prompt: str | None = None
    negative_template: bool | None = None
    system_prompt: str | None = None
    panel: dict[str, str] | None = None
    model: str | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    shift: float | None = None
    time_grid: str | None = None
    sigmas: list[float] | None = None
    cfg_trunc_ratio: float | None = None
    cfg_trunc_t: float | None = None
    cfg_renorm: str | None = None
    cfg_renorm_scale: float | None = None
    cache: str | float | None = None
    preset: str | None = None
    loras: list[dict[str, Any]] | None = None
    partial_images: int = 0
    output_format: OutputFormat = "png"
    quality: int | None = None
    embed_parameters: bool = True
    metadata: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a specification; raises ProtocolError, also for a version from the future."""
        spec = super().from_json(text)
        if spec.version > SPEC_VERSION:
            raise ProtocolError(
                f"JobSpec: version {spec.version} is newer than this process ({SPEC_VERSION})"
            )
        return spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRef(_Message):
    """One stored picture: its blob path, hash of the stored bytes, size in pixels and seed."""

    path: str
    sha256: str
    width: int
    height: int
    seed: int
    format: OutputFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings(_Message):
    """Seconds a job spent in each stage; `total_s` from submission to the stored picture."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    store_s: float
    total_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCounts(_Message):
    """Denoising steps that computed the model, that a cache skipped, and that used guidance.

    `nfe` counts the branches whose joint blocks were evaluated for each picture, cond and uncond.
    """

    computed: int
    skipped: int
    cfg: int
    nfe: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobResult(_Message):
    """What a worker commits: pictures in the order of their seeds, and how they were made.

    `prompt_tokens` are those the text encoder read, template included. `cache_decisions` is what a
    cache threshold decided: for each branch a letter per step, 1 computed, 0 skipped.
    """

    images: tuple[ImageRef, ...]
    timings: Timings
    steps: StepCounts
    warnings: tuple[str, ...]
    model: str
    prompt_tokens: int = 0
    cache_decisions: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobError(_Message):
    """Why a job failed: a stable code and one sentence for its owner."""

    code: str
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord(_Message):
    """Everything the queue knows of a job. Times are milliseconds of the Redis clock.

    `position` is 1 for the next of the queued jobs in its pool, None unless queued. `step` of
    `total` is the progress of the current attempt. `expires_ms` is set once the job has ended.
    `retry_of` names the dead job that this one repeats. `start_ms` is when a queued job may start,
    by the estimated costs of those before it.
    """

    id: str
    status: JobStatus
    tenant: str
    pool: str
    priority: Priority
    spec: JobSpec
    step: int
    total: int
    position: int | None
    attempts: int
    claim_no: int
    worker: str | None
    submitted_ms: int
    started_ms: int | None
    finished_ms: int | None
    expires_ms: int | None
    error: JobError | None
    result: JobResult | None
    deadline_ms: int | None = None
    retry_of: str | None = None
    start_ms: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the status is one that never changes again."""
        return self.status in TERMINAL_STATUSES


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo(_Message):
    """What the workers of a pool serve: the limits and defaults the API validates against.

    `defaults` holds the checkpoint's own values by JobSpec field name; `presets` the same for
    each named preset; `loras` the names that requests may use. `step_cost_ms` is the measured time
    of one denoising step of one image of the default size with guidance; `step_fixed_ms` is what of
    it any step costs, however small. The rest is priced in proportion to pixels and images.
    """

    name: str
    hash: str
    min_size: int
    max_size: int
    size_multiple: int
    default_width: int
    default_height: int
    max_steps: int
    default_steps: int
    max_prompt_tokens: int
    step_cost_ms: float
    step_fixed_ms: float = 0.0
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    presets: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    templates: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerInfo(_Message):
    """A live worker: where it runs and the jobs it holds. `beat_ms` is its last heartbeat."""

    id: str
    pool: str
    running: int
    beat_ms: int
