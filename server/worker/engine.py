"""The engine: a pipeline on its device, and the denoising state of every running request.

It computes what the scheduler decides. A request that fails takes nobody with it: when a batch
raises, its members are tried again one by one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import structlog
from PIL import Image

from model.request import GenerationRequest
from server.protocol import JobError, JobSpec, StepCounts
from server.queue.jobs import Claim
from server.scheduler.request import RunningRequest
from server.scheduler.scheduler import Remaining, StepBatch
from server.worker.memory import is_out_of_memory, release_memory

log = structlog.get_logger(__name__)
T = TypeVar("T")

INTERNAL = JobError(
    code="internal", detail="the worker hit an unexpected error; its log has the details"
)

OUT_OF_MEMORY = JobError(
    code="out-of-memory",
    detail="the picture needs more memory than the device has free; ask for a smaller one or fewer",
)
TILED = (
    "the device was short of memory, so the picture was decoded in tiles; "
    "it may differ slightly from one that was not"
)


class RequestState(Protocol):
    """What the engine reads of `model.pipeline.DenoiseState`."""

    request: Any
    warnings: list[str]
    steps_computed: int
    steps_cfg: int
    nfe: int

    @property
    def step_index(self) -> int:
        """Steps done."""

    @property
    def num_steps(self) -> int:
        """Steps in all."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the next step."""

    @property
    def num_sequences(self) -> int:
        """Sequences of the next step."""

    @property
    def predicted(self) -> Sequence[Any]:
        """Clean latents of every image as the last step foresaw them."""

    @property
    def held_bytes(self) -> int:
        """Device memory it keeps between steps."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, template included."""

    @property
    def cache_decisions(self) -> dict[str, str]:
        """What a cache threshold decided, by branch."""


class StepPipeline(Protocol):
    """What the engine needs of `model.pipeline.Pipeline`."""

    def prepare(self, request: GenerationRequest, /) -> Any:
        """Return the state of a request that has taken no step."""

    def denoise_step(self, states: Sequence[Any], /) -> None:
        """Advance every state by one step, or raise and advance none."""

    def decode(self, states: Sequence[Any], /, *, tiled: bool = False) -> list[list[Image.Image]]:
        """Return the pictures of each state; `tiled` needs less memory."""


@dataclass
class ActiveJob:
    """A claimed job in this process. Times are monotonic seconds at the end of each stage."""

    claim: Claim
    state: RequestState
    claimed_at: float
    prepared_at: float
    denoised_at: float = 0.0
    decoded_at: float = 0.0

    @property
    def steps(self) -> StepCounts:
        """How its steps were done."""
        computed = self.state.steps_computed
        return StepCounts(
            computed=computed,
            skipped=self.state.step_index - computed,
            cfg=self.state.steps_cfg,
            nfe=self.state.nfe,
        )


@dataclass(frozen=True)
class Failure:
    """A job the engine gave up, and whether another attempt may help."""

    claim: Claim
    error: JobError
    retry: bool


@dataclass(frozen=True)
class Decoded:
    """A job whose pictures are ready to be stored."""

    job: ActiveJob
    images: list[Image.Image]


def generation_request(spec: JobSpec) -> GenerationRequest:
    """Return the part of a job that concerns the picture; raises ValueError."""
    names = [field.name for field in fields(GenerationRequest)]
    return GenerationRequest(**{name: getattr(spec, name) for name in names})


class Engine:
    """Runs requests on one pipeline. Used from one thread only.

    Args:
        pipeline: the model.
        beat: called after every stage, to show progress.
        on_out_of_memory: called with the tokens of a step that memory did not suffice for.
    """

    def __init__(
        self,
        pipeline: StepPipeline,
        beat: Callable[[], None] = lambda: None,
        on_out_of_memory: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._pipeline = pipeline
        self._beat = beat
        self._on_out_of_memory = on_out_of_memory
        self.num_out_of_memory = 0
        self._jobs: dict[str, ActiveJob] = {}

    def prepare(self, claim: Claim, claimed_at: float) -> RunningRequest | Failure:
        """Encode the prompt and draw the noise; a request the model refuses is a Failure."""
        try:
            state: RequestState = self._prepare(claim)
        except ValueError as error:
            return Failure(claim, JobError(code="invalid-request", detail=str(error)), retry=False)
        except Exception as error:
            log.exception("prepare failed", job=claim.job_id)
            return self._failure(claim, error)
        self._jobs[claim.key] = ActiveJob(claim, state, claimed_at, time.monotonic())
        self._beat()
        return RunningRequest(
            key=claim.key,
            num_tokens=state.num_tokens,
            num_sequences=state.num_sequences,
            steps_left=state.num_steps,
            cost_ms=claim.cost_ms,
            solo=claim.solo,
            priority=claim.priority,
            submitted_at=claimed_at - claim.waited_ms / 1000,
            held_bytes=state.held_bytes,
            deadline_at=None if claim.left_ms is None else claimed_at + claim.left_ms / 1000,
        )

    def step(self, batch: StepBatch) -> list[Failure]:
        """Advance the batch by one step in one packed forward; returns the members that failed."""
        if not batch.keys:
            return []
        jobs = [self._jobs[key] for key in batch.keys]
        _, failures = self._run(self._denoise, jobs)
        self._beat()
        return failures

    def remaining(self, batch: StepBatch) -> dict[str, Remaining]:
        """What the members of the batch still need; failed ones are missing."""
        states = {key: self._jobs[key].state for key in batch.keys if key in self._jobs}
        return {
            key: Remaining(
                state.num_tokens, state.num_steps - state.step_index, state.num_sequences
            )
            for key, state in states.items()
        }

    def decode(self, keys: Sequence[str]) -> tuple[list[Decoded], list[Failure]]:
        """Turn finished requests into pictures; the engine forgets them."""
        if not keys:
            return [], []
        jobs = [self._jobs[key] for key in keys]
        now = time.monotonic()
        for job in jobs:
            job.denoised_at = now
        decoded, failures = self._run(self._decode, jobs)
        for key in keys:
            self._jobs.pop(key, None)
        self._beat()
        return [each for some in decoded for each in some], failures

    def job(self, key: str) -> ActiveJob:
        """A running request."""
        return self._jobs[key]

    def progress(self, key: str) -> tuple[int, int]:
        """Steps done and steps in all of a running request."""
        state = self._jobs[key].state
        return state.step_index, state.num_steps

    def abort(self, key: str) -> Claim | None:
        """Forget a request; returns its claim."""
        job = self._jobs.pop(key, None)
        return None if job is None else job.claim

    def claims(self) -> list[Claim]:
        """The claims of all requests that have not been decoded."""
        return [job.claim for job in self._jobs.values()]

    def _prepare(self, claim: Claim) -> RequestState:
        """Prepare and, where memory did not suffice, once more with all that can be freed."""
        request = generation_request(claim.spec)
        try:
            state: RequestState = self._pipeline.prepare(request)
            return state
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("preparing again", job=claim.job_id)
            self.num_out_of_memory += 1
            _let_go(error)
        again: RequestState = self._pipeline.prepare(request)
        return again

    def _denoise(self, jobs: list[ActiveJob]) -> None:
        try:
            self._pipeline.denoise_step([job.state for job in jobs])
        except Exception as error:
            if is_out_of_memory(error):
                self._on_out_of_memory(sum(job.state.num_tokens for job in jobs))
            raise

    def _decode(self, jobs: list[ActiveJob]) -> list[Decoded]:
        pictures: list[list[Image.Image]] = []
        try:
            pictures = self._pipeline.decode([job.state for job in jobs])
        except Exception as error:
            if len(jobs) > 1 or not is_out_of_memory(error):
                raise
            log.warning("decoding in tiles", job=jobs[0].claim.job_id)
            _let_go(error)
        if not pictures:
            pictures = self._pipeline.decode([jobs[0].state], tiled=True)
            jobs[0].state.warnings.append(TILED)
        now = time.monotonic()
        for job in jobs:
            job.decoded_at = now
        return [Decoded(job, images) for job, images in zip(jobs, pictures, strict=True)]

    def _run(
        self, act: Callable[[list[ActiveJob]], T], jobs: list[ActiveJob]
    ) -> tuple[list[T], list[Failure]]:
        """Act on all jobs at once or, if that raises, on fewer: the culprit fails alone.

        A step that raises has changed no state, so the others lose nothing. A batch that is too
        large for memory is halved, any other is tried member by member; a job that is too large
        alone gets a second chance after everything unused has been given back.
        """
        try:
            return [act(jobs)], []
        except Exception as error:
            failed, short = error, is_out_of_memory(error)
            log.exception("batch failed", jobs=[job.claim.job_id for job in jobs])
        if short:
            self.num_out_of_memory += 1
            _let_go(failed)
        if len(jobs) > 1:
            size = (len(jobs) + 1) // 2 if short else 1
            parts = [self._run(act, jobs[i : i + size]) for i in range(0, len(jobs), size)]
            return [x for some, _ in parts for x in some], [x for _, some in parts for x in some]
        if short:
            try:
                return [act(jobs)], []
            except Exception as error:
                failed = error
                log.exception("job failed again", job=jobs[0].claim.job_id)
        self._jobs.pop(jobs[0].claim.key, None)
        return [], [self._failure(jobs[0].claim, failed)]

    def _failure(self, claim: Claim, error: Exception) -> Failure:
        """What the caller hears of an error; want of memory would only repeat itself."""
        if is_out_of_memory(error):
            return Failure(claim, OUT_OF_MEMORY, retry=False)
        return Failure(claim, INTERNAL, retry=True)


def _let_go(error: Exception) -> None:
    """Free what a failed attempt holds: the frames that the error keeps, and unused memory."""
    kept: BaseException | None = error
    while kept is not None:
        kept.__traceback__, kept = None, kept.__cause__ or kept.__context__
    release_memory()
