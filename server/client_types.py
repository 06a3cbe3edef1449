"""What the Python client takes and gives: request fields, jobs, events and errors.

Written apart from the server's own classes, as the two may be of different versions: a field that
is not known here is ignored, one that the server does not send is None.

LuminaError
├── NotReachable         the server did not answer, however often it was asked
├── WaitTimeout          the job had not ended in time; it goes on
├── DamagedImage         the bytes are not those the job names
├── JobFailed            the job ended without a picture: `job`
│   ├── JobCanceled
│   └── JobExpired
└── ApiError             the server refused: `status`, `code`, `detail`, `fields`
    ├── InvalidInput     400, 413, 415, 422
    ├── NotAllowed       401, 403
    ├── Missing          404
    ├── TooManyRequests  429
    └── ServerTrouble    5xx
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})


class GenerateFields(TypedDict, total=False):
    """The optional fields of `POST /generate`; the server's `/docs` says what each may be."""

    negative_prompt: str | None
    negative_template: bool | None
    system_prompt: str | None
    panel: Mapping[str, str] | None
    model: str | None
    width: int | None
    height: int | None
    num_images: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    seed: int | None
    sampler: Literal["euler", "midpoint", "dpm"] | None
    shift: float | None
    time_grid: Literal["diffusers", "official"] | None
    sigmas: Sequence[float] | None
    cfg_trunc_ratio: float | None
    cfg_trunc_t: float | None
    cfg_renorm: Literal["none", "global", "row"] | None
    cfg_renorm_scale: float | None
    cache: Literal["off", "balanced", "fast"] | float | None
    preset: str | None
    loras: Sequence[Mapping[str, Any]] | None
    output_format: Literal["png", "jpeg", "webp"] | None
    quality: int | None
    embed_parameters: bool | None
    priority: Literal["low", "normal", "high"] | None
    deadline_s: float | None
    webhook_url: str | None
    metadata: Mapping[str, str | int | float | bool | None] | None


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class JobImage(_Answer):
    """One picture of a job; `Client.fetch` and `Client.picture` get it from `url`."""

    url: str
    sha256: str
    width: int
    height: int
    seed: int


class JobError(_Answer):
    """Why a job failed: a stable code and one sentence."""

    code: str
    detail: str


class Timings(_Answer):
    """Seconds spent in each stage."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    store_s: float
    total_s: float


class Steps(_Answer):
    """Denoising steps that computed the model, that a cache skipped, and that used guidance."""

    computed: int
    skipped: int
    cfg: int
    nfe: int | None = None


class Job(_Answer):
    """A job as the server reports it. Times are RFC 3339, UTC."""

    id: str
    status: Status
    error: JobError | None = None
    position: int | None = None
    estimated_start: str | None = None
    step: int = 0
    total: int = 0
    attempt: int = 0
    submitted_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    expires_at: str | None = None
    model: str | None = None
    seed: int | None = None
    images: tuple[JobImage, ...] = ()
    timings: Timings | None = None
    steps: Steps | None = None
    prompt_tokens: int | None = None
    cache_decisions: dict[str, str] | None = None
    warnings: tuple[str, ...] = ()
    metadata: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether its status never changes again."""
        return self.status in TERMINAL


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job.

    Attributes:
        type: `queued`, `started`, `progress`, `preview`, or the terminal status.
        data: fields of the job.
        id: for `Client.watch(..., after=)`; None for previews, which are not repeated.
    """

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    id: str | None = None

    @property
    def last(self) -> bool:
        """Whether the job has ended with this."""
        return self.type in TERMINAL

    @property
    def step(self) -> int | None:
        """Steps done, of `total`; None where the event does not say."""
        return self.data.get("step")

    @property
    def total(self) -> int | None:
        """Steps to do."""
        return self.data.get("total")

    @property
    def preview(self) -> bytes | None:
        """The unfinished picture of a `preview`, a small JPEG file."""
        text = self.data.get("b64_json")
        return base64.b64decode(text) if self.type == "preview" and text else None

    @property
    def job(self) -> Job | None:
        """The whole job, which the last event brings."""
        try:
            return Job.model_validate(self.data) if self.last else None
        except ValidationError:
            return None


class LuminaError(Exception):
    """Base of what the client raises."""


class NotReachable(LuminaError):
    """The server did not answer, however often it was asked."""


class WaitTimeout(LuminaError):
    """The job had not ended in time. It goes on: watch, wait or cancel it."""

    def __init__(self, job_id: str, timeout_s: float) -> None:
        super().__init__(f"job {job_id} has not ended within {timeout_s:g} s")
        self.job_id = job_id


class DamagedImage(LuminaError):
    """The bytes that came are not those the job names by their sha256."""


class JobFailed(LuminaError):
    """The job ended without a picture."""

    def __init__(self, job: Job) -> None:
        reason = job.error.detail if job.error else f"the job was {job.status}"
        super().__init__(f"job {job.id}: {reason}")
        self.job = job

    @property
    def code(self) -> str:
        """Stable, for programs."""
        return self.job.error.code if self.job.error else self.job.status


class JobCanceled(JobFailed):
    """The job was canceled."""


class JobExpired(JobFailed):
    """The job missed its deadline."""


class ApiError(LuminaError):
    """The server refused a request.

    Attributes:
        status: of HTTP.
        code: stable, for programs.
        detail: one sentence.
        fields: what is wrong with each field of the body.
        job_id: the job that this is about.
        request_id: for the operator's log.
        retry_after_s: when to come back, where the server says so.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        fields: Mapping[str, str] | None = None,
        job_id: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.fields = dict(fields or {})
        self.job_id = job_id
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidInput(ApiError):
    """The request is wrong; sending it again does not help."""


class NotAllowed(ApiError):
    """The API key is missing, unknown or lacks the right."""


class Missing(ApiError):
    """There is no such job or picture, or it belongs to somebody else."""


class TooManyRequests(ApiError):
    """A limit of this caller is reached."""


class ServerTrouble(ApiError):
    """The server cannot serve the request now."""


def failure_of(job: Job) -> JobFailed:
    """The error of a job that ended without a picture."""
    assert job.finished
    kinds = {"canceled": JobCanceled, "expired": JobExpired}
    return kinds.get(job.status, JobFailed)(job)
