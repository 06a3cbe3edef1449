"""What a job looks like from outside: the answer of `POST /generate` and `GET /jobs/{id}`."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from server.api.image_links import ImageLinks
from server.protocol import JobRecord, JobStatus


class ErrorAnswer(BaseModel):
    """Why a job failed: a stable code and one sentence."""

    code: str
    detail: str


class ImageAnswer(BaseModel):
    """One picture; `url` is a path on this server, with an expiring signature where keys are on."""

    url: str
    sha256: str
    width: int
    height: int
    seed: int


class TimingsAnswer(BaseModel):
    """Seconds spent in each stage."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    store_s: float
    total_s: float


class StepsAnswer(BaseModel):
    """Denoising steps by kind."""

    computed: int
    skipped: int
    cfg: int
    nfe: int = Field(description="branches of the network evaluated for each picture")


class JobAnswer(BaseModel):
    """A job as `POST /generate` and `GET /jobs/{id}` report it. Times are RFC 3339, UTC."""

    id: str
    status: JobStatus
    error: ErrorAnswer | None
    position: int | None = Field(description="1 = next of the queued jobs; null unless queued")
    estimated_start: str | None = Field(
        description="by the estimated costs of the jobs before it; null unless queued"
    )
    step: int
    total: int = Field(description="steps of this job; 0 until a worker has prepared it")
    attempt: int
    submitted_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None
    model: str | None
    seed: int
    images: list[ImageAnswer]
    timings: TimingsAnswer | None
    steps: StepsAnswer | None
    prompt_tokens: int | None = Field(description="tokens of the prompt, template included")
    cache_decisions: dict[str, str] | None = Field(
        description="what a cache threshold decided: for each image and branch a letter per step, "
        "1 computed, 0 skipped"
    )
    warnings: list[str]
    metadata: dict[str, Any] | None


def rfc3339(time_ms: int) -> str:
    """Return a time in ms since 1970 as RFC 3339 writes it, in UTC."""
    text = datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _when(time_ms: int | None) -> str | None:
    return None if time_ms is None else rfc3339(time_ms)


def job_answer(record: JobRecord, links: ImageLinks) -> JobAnswer:
    """Return what a caller sees of a job."""
    result = record.result
    images = [
        ImageAnswer(
            url=links.url(record.id, index),
            sha256=image.sha256,
            width=image.width,
            height=image.height,
            seed=image.seed,
        )
        for index, image in enumerate(result.images if result else ())
    ]
    error = record.error
    return JobAnswer(
        id=record.id,
        status=record.status,
        error=ErrorAnswer(code=error.code, detail=error.detail) if error else None,
        position=record.position,
        estimated_start=_when(record.start_ms),
        step=record.step,
        total=record.total,
        attempt=record.attempts,
        submitted_at=rfc3339(record.submitted_ms),
        started_at=_when(record.started_ms),
        finished_at=_when(record.finished_ms),
        expires_at=_when(record.expires_ms),
        model=result.model if result else record.spec.model,
        seed=record.spec.seed,
        images=images,
        timings=TimingsAnswer(**vars(result.timings)) if result else None,
        steps=StepsAnswer(**vars(result.steps)) if result else None,
        prompt_tokens=result.prompt_tokens if result else None,
        cache_decisions=(result.cache_decisions or None) if result else None,
        warnings=list(result.warnings) if result else [],
        metadata=record.spec.metadata,
    )
