"""Previews of running jobs, for those who look, without the step loop waiting for them.

A job somebody watches gets its latest preview replaced about once a second: the clean latents that
the last step foresaw, by a linear map (0.5 ms for 128 px on a CPU core, where the VAE takes 100 ms
and a step 60 ms). Partial pictures, which a caller asks for by number, are decoded by the VAE.
Drawing, encoding and storing happen on other threads; previews come last and are dropped at will.
"""

import io
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import structlog
from PIL import Image

from server.queue.jobs import Claim, JobQueue
from server.queue.keys import PREVIEW_LIMIT_BYTES
from server.worker.engine import ActiveJob
from server.worker.intake import Intake

log = structlog.get_logger(__name__)

PREVIEW_S = 1.0  # between two previews of a job
LOOK_S = 0.5  # between two looks at who is watched
PREVIEW_SIDE = 256  # rough previews are enlarged towards this many pixels
PUT_S = 5.0  # a partial picture that Redis does not take by then is missing
QUALITIES = (90, 75, 60, 40, 20)


class Painter(Protocol):
    """Draws unfinished latents: `model.preview.LatentPainter`."""

    def rough(self, latents: Any, /) -> Image.Image:
        """Return a small picture quickly."""

    def full(self, latents: Any, /) -> Image.Image:
        """Return the picture in full size."""


def partial_number(step: int, num_steps: int, wanted: int) -> int | None:
    """Which partial picture (from 0) is due after `step` of `num_steps`, if any.

    `wanted` of them lie evenly over the steps, none on the last; jobs of fewer steps get fewer.
    """
    due = {num_steps * (k + 1) // (wanted + 1): k for k in range(wanted)}
    return due.get(step) if 0 < step < num_steps else None


def encode_preview(picture: Image.Image) -> bytes:
    """JPEG of at most 64 KiB, as good as fits; a picture that never fits is halved."""
    picture = picture.convert("RGB")
    while True:
        for quality in QUALITIES:
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= PREVIEW_LIMIT_BYTES:
                return buffer.getvalue()
        picture = picture.reduce(2)


class Previews:
    """Looks after the previews of one worker. Called from the engine's thread.

    Args:
        intake: whose queue keeps the pictures.
        painter: draws them; None draws none.
    """

    def __init__(self, intake: Intake, painter: Painter | None) -> None:
        self._intake = intake
        self._painter = painter
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preview")
        self._seen: set[str] = set()
        self._watched: Future[set[str]] | None = None
        self._looked_at = 0.0
        self._next_at: dict[str, float] = {}
        self._drawing: dict[str, Future[None]] = {}
        self._partials: list[tuple[str, Future[None]]] = []

    def step_done(self, job: ActiveJob) -> None:
        """Draw what this job is owed after the step it has taken; returns at once."""
        state, claim = job.state, job.claim
        if self._painter is None or state.step_index >= state.num_steps:
            return
        self._seen.add(claim.job_id)
        number = partial_number(state.step_index, state.num_steps, claim.spec.partial_images)
        if number is not None:
            self._partials = [(key, drawn) for key, drawn in self._partials if not drawn.done()]
            for image, latents in enumerate(state.predicted):
                drawn = self._thread.submit(self._partial, claim, image, number, latents)
                self._partials.append((claim.key, drawn))
        if self._is_watched(claim) and self._is_due(claim):
            drawing = self._thread.submit(self._preview, claim, state.predicted[0])
            self._drawing[claim.job_id] = drawing

    def partials(self, claim: Claim) -> list[Future[None]]:
        """Partial pictures of a claim that are still on their way: its result must not overtake
        them, or they would be refused."""
        return [drawn for key, drawn in self._partials if key == claim.key]

    def stop(self) -> None:
        """Draw nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_watched(self, claim: Claim) -> bool:
        """By the last answer; asks again from time to time, without waiting."""
        now = time.monotonic()
        asking = self._watched is not None and not self._watched.done()
        known: set[str] = set()
        if self._watched is not None and not asking and self._watched.exception() is None:
            known = self._watched.result()
        if now - self._looked_at > LOOK_S and not asking:
            seen, self._seen, self._looked_at = list(self._seen), set(), now
            for kept in (self._next_at, self._drawing):
                for job_id in kept.keys() - set(seen):
                    kept.pop(job_id, None)
            self._watched = self._intake.ask(lambda queue: queue.watched(seen))
        return claim.job_id in known

    def _is_due(self, claim: Claim) -> bool:
        now, drawing = time.monotonic(), self._drawing.get(claim.job_id)
        if now < self._next_at.get(claim.job_id, 0.0) or (drawing and not drawing.done()):
            return False
        self._next_at[claim.job_id] = now + PREVIEW_S
        return True

    def _preview(self, claim: Claim, latents: Any) -> None:
        def draw(painter: Painter) -> Image.Image:
            picture = painter.rough(latents)
            times = max(1, PREVIEW_SIDE // max(picture.size))
            size = picture.width * times, picture.height * times
            return picture.resize(size, Image.Resampling.BICUBIC)

        self._keep(claim, draw, lambda queue, data: queue.put_preview(claim, data))

    def _partial(self, claim: Claim, image: int, number: int, latents: Any) -> None:
        kept = self._keep(
            claim,
            lambda painter: painter.full(latents),
            lambda queue, data: queue.put_partial(claim, image, number, data),
        )
        if kept is not None:
            wait((kept,), PUT_S)

    def _keep(
        self,
        claim: Claim,
        draw: Callable[[Painter], Image.Image],
        put: Callable[[JobQueue, bytes], Any],
    ) -> Future[Any] | None:
        """Draw, and begin to store; a preview that fails is missing, nothing else."""
        assert self._painter is not None
        try:
            data = encode_preview(draw(self._painter))
        except Exception:
            log.exception("preview failed", job=claim.job_id)
            return None
        return self._intake.ask(lambda queue: put(queue, data))
