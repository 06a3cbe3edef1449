"""From pictures to a committed job, off the step loop: encode, store, then commit.

The blobs are stored before the job is marked done: a crash in between repeats work and loses
nothing. What a refused claim stored is removed again.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import structlog
from PIL import Image

from server.protocol import ImageRef, JobError, JobResult, Timings
from server.queue.blobs import BlobStore, image_path
from server.queue.jobs import Claim
from server.worker.content_credentials import ContentCredentials
from server.worker.engine import ActiveJob, Decoded
from server.worker.intake import Intake
from server.worker.picture_file import carries, encode_image, parameters_of

log = structlog.get_logger(__name__)

NUM_THREADS = 2
TOO_LONG = "the parameters are too long for a {} file, which does not carry them: a PNG would"
BEFORE_S = 30.0  # how long a finished job waits for its own partial pictures


class Output:
    """Encodes, stores and commits in a few threads of its own.

    Args:
        intake: commits the jobs.
        blobs: takes the pictures.
        model_name: goes into the result and the picture.
        model_hash: goes into the picture.
        credentials: sign the pictures, where configured.
        on_finished: called with every result that stands, in one of the threads.
    """

    def __init__(
        self,
        intake: Intake,
        blobs: BlobStore,
        model_name: str,
        model_hash: str,
        credentials: ContentCredentials | None = None,
        on_finished: Callable[[JobResult], None] = lambda _: None,
    ) -> None:
        self._intake = intake
        self._blobs = blobs
        self._model_name = model_name
        self._model_hash = model_hash
        self._credentials = credentials
        self._on_finished = on_finished
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="output")
        self._pending: dict[Future[None], Claim] = {}

    @property
    def pending(self) -> int:
        """Jobs on their way to the blob store or the queue."""
        self._pending = {future: c for future, c in self._pending.items() if not future.done()}
        return len(self._pending)

    def submit(self, decoded: Decoded, before: Sequence[Future[None]] = ()) -> None:
        """Store a job, and commit it once what comes `before` is done; returns at once."""
        self._intake.storing(decoded.job.claim)
        future = self._threads.submit(self._finish, decoded, before)
        self._pending[future] = decoded.job.claim

    def stop(self) -> list[Claim]:
        """Start nothing more; returns the claims that did not get through."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        return [claim for future, claim in self._pending.items() if future.cancelled()]

    def _finish(self, decoded: Decoded, before: Sequence[Future[None]]) -> None:
        claim = decoded.job.claim
        try:
            images = self._store(decoded)
            result = self._result(decoded.job, images)
        except Exception as error:
            log.exception("store failed", job=claim.job_id)
            sentence = f"the picture could not be stored ({type(error).__name__})"
            self._intake.fail(claim, JobError(code="store-failed", detail=sentence), retry=True)
            return
        wait(before, BEFORE_S)
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
            data = self._encode(decoded.job, index, image)
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

    def _encode(self, job: ActiveJob, index: int, image: Image.Image) -> bytes:
        spec, model = job.claim.spec, (self._model_name, self._model_hash)
        parameters = self._parameters(job, index)
        data = encode_image(image, spec.output_format, spec.quality, parameters)
        if self._credentials is not None:
            data = self._credentials.sign(data, spec.output_format, *model)
        return data

    def _parameters(self, job: ActiveJob, index: int) -> dict[str, Any] | None:
        """What the picture says of its making, unless the request wants it to say nothing."""
        if not job.claim.spec.embed_parameters:
            return None
        return parameters_of(job.state.request, self._model_name, self._model_hash, index)

    def _result(self, job: ActiveJob, images: list[ImageRef]) -> JobResult:
        spec, parameters = job.claim.spec, self._parameters(job, 0)
        warnings = list(job.state.warnings)
        if parameters is not None and not carries(spec.output_format, parameters):
            warnings.append(TOO_LONG.format(spec.output_format))
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
            warnings=tuple(warnings),
            model=self._model_name,
            prompt_tokens=job.state.prompt_tokens,
            cache_decisions=job.state.cache_decisions,
        )
