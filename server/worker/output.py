"""From pictures to a committed job, off the step loop: encode, store, then commit.

The blobs are stored before the job is marked done: a crash in between repeats work and loses
nothing. What a refused claim stored is removed again.
"""

import contextlib
import io
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import structlog
from PIL import Image, PngImagePlugin

from server.protocol import (
    PNG_TEXT_KEY,
    ImageRef,
    JobError,
    JobResult,
    OutputFormat,
    Timings,
)
from server.queue.blobs import BlobStore, image_path
from server.queue.jobs import Claim
from server.worker.engine import ActiveJob, Decoded
from server.worker.intake import Intake

log = structlog.get_logger(__name__)

JPEG_QUALITY = 90
WEBP_QUALITY = 90
NUM_THREADS = 2


def encode_image(
    image: Image.Image, output_format: OutputFormat, quality: int | None, parameters: dict[str, Any]
) -> bytes:
    """Return the file of a picture; a PNG carries `parameters` as JSON in a text chunk.

    Equal arguments give equal bytes. `quality` (1..100) is for jpeg and webp.
    """
    buffer = io.BytesIO()
    if output_format == "png":
        info = PngImagePlugin.PngInfo()
        text = json.dumps(parameters, ensure_ascii=False, sort_keys=True)
        info.add_itxt(PNG_TEXT_KEY, text)
        image.save(buffer, "PNG", pnginfo=info)
    elif output_format == "jpeg":
        image.convert("RGB").save(buffer, "JPEG", quality=quality or JPEG_QUALITY)
    else:
        image.save(buffer, "WEBP", quality=quality or WEBP_QUALITY)
    return buffer.getvalue()


def parameters_of(request: Any, model_name: str, model_hash: str, index: int) -> dict[str, Any]:
    """What made picture `index` of a resolved request: settings, model, seed; no id, no time."""
    settings = asdict(request)
    del settings["num_images"]
    given = {name: value for name, value in settings.items() if value is not None}
    return {**given, "seed": given["seed"] + index, "model": model_name, "model_hash": model_hash}


class Output:
    """Encodes, stores and commits in a few threads of its own.

    Args:
        intake: commits the jobs.
        blobs: takes the pictures.
        model_name: goes into the result and the picture.
        model_hash: goes into the picture.
        on_finished: called with every result that stands, in one of the threads.
    """

    def __init__(
        self,
        intake: Intake,
        blobs: BlobStore,
        model_name: str,
        model_hash: str,
        on_finished: Callable[[JobResult], None] = lambda _: None,
    ) -> None:
        self._intake = intake
        self._blobs = blobs
        self._model_name = model_name
        self._model_hash = model_hash
        self._on_finished = on_finished
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="output")
        self._pending: dict[Future[None], Claim] = {}

    @property
    def pending(self) -> int:
        """Jobs on their way to the blob store or the queue."""
        self._pending = {future: c for future, c in self._pending.items() if not future.done()}
        return len(self._pending)

    def submit(self, decoded: Decoded) -> None:
        """Store and commit a job; returns at once."""
        self._intake.storing(decoded.job.claim)
        future = self._threads.submit(self._finish, decoded)
        self._pending[future] = decoded.job.claim

    def stop(self) -> list[Claim]:
        """Start nothing more; returns the claims that did not get through."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        return [claim for future, claim in self._pending.items() if future.cancelled()]

    def _finish(self, decoded: Decoded) -> None:
        claim = decoded.job.claim
        try:
            images = self._store(decoded)
            result = self._result(decoded.job, images)
        except Exception as error:
            log.exception("store failed", job=claim.job_id)
            sentence = f"the picture could not be stored ({type(error).__name__})"
            self._intake.fail(claim, JobError(code="store-failed", detail=sentence), retry=True)
            return
        if self._intake.complete(claim, result).result():
            self._on_finished(result)
        else:
            for image in images:
                with contextlib.suppress(OSError):
                    self._blobs.delete(image.path)

    def _store(self, decoded: Decoded) -> list[ImageRef]:
        claim, spec = decoded.job.claim, decoded.job.claim.spec
        refs = []
        for index, image in enumerate(decoded.images):
            request = decoded.job.state.request
            parameters = parameters_of(request, self._model_name, self._model_hash, index)
            data = encode_image(image, spec.output_format, spec.quality, parameters)
            path = image_path(claim.tenant, claim.job_id, claim.claim_no, index, spec.output_format)
            refs.append(
                ImageRef(
                    path=path,
                    sha256=self._blobs.put(path, data),
                    width=image.width,
                    height=image.height,
                    seed=spec.seed + index,
                    format=spec.output_format,
                )
            )
        return refs

    def _result(self, job: ActiveJob, images: list[ImageRef]) -> JobResult:
        now = time.monotonic()
        queue_s = job.claim.waited_ms / 1000
        timings = Timings(
            queue_s=round(queue_s, 4),
            encode_s=round(job.prepared_at - job.claimed_at, 4),
            denoise_s=round(job.denoised_at - job.prepared_at, 4),
            decode_s=round(job.decoded_at - job.denoised_at, 4),
            store_s=round(now - job.decoded_at, 4),
            total_s=round(queue_s + now - job.claimed_at, 4),
        )
        return JobResult(
            images=tuple(images),
            timings=timings,
            steps=job.steps,
            warnings=tuple(job.state.warnings),
            model=self._model_name,
            prompt_tokens=job.state.prompt_tokens,
            cache_decisions=job.state.cache_decisions,
        )
