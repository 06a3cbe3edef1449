"""The worker process: the loop around the engine, signals, and the orderly end."""

import concurrent.futures
import dataclasses
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import structlog

from server.config import Settings
from server.log import configure_logging
from server.protocol import DEFAULT_POOL
from server.queue.blobs import BlobStore
from server.queue.jobs import Claim, open_queue
from server.scheduler.budget import StepBudget
from server.scheduler.scheduler import Capacity, Scheduler, StepBatch
from server.worker.content_credentials import open_credentials
from server.worker.engine import Decoded, Engine, Failure
from server.worker.intake import Arrival, Inbox, Intake
from server.worker.loading import LoadedModel, load_model
from server.worker.output import Output
from server.worker.preview import Painter, Previews
from server.worker.probes import Probes, open_probes
from server.worker.pulse import Pulse
from server.worker.telemetry import Telemetry
from server.worker.warmup import WarmUp, compiled_graphs, warm_up

log = structlog.get_logger(__name__)

IDLE_WAIT_S = 0.2
GOODBYE_S = 3.0
MISUSE = 2  # exit codes: the checkpoint cannot be served; ...
LOAD_FAULT = 3  # ... it could not be loaded this time, which another start may cure
FULL = Capacity(jobs=0, cost_ms=0.0, idle=False)


class Worker:
    """The engine's loop: every turn advances all running requests by one denoising step."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        intake: Intake,
        output: Output,
        pulse: Pulse,
        painter: Painter | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.intake = intake
        self.output = output
        self.pulse = pulse
        self.previews = Previews(intake, painter)
        self.telemetry = telemetry or Telemetry(intake.pool, intake.worker_id)
        self.stopping = False
        self._step_s = 0.0
        self.num_recompiles = 0
        self._graphs = compiled_graphs()  # of the warm-up; any more are too many

    def run(self, drain_s: float) -> None:
        """Serve until `stopping` is set, then finish what fits into `drain_s` and hand back."""
        while not self.stopping:
            self.turn()
        self._drain(time.monotonic() + drain_s)

    def turn(self) -> None:
        """Take in what is new, advance everybody by one step, hand over the finished."""
        self.pulse.beat()
        inbox = self.intake.poll(self._capacity(), 0.0 if len(self.scheduler) else IDLE_WAIT_S)
        self._take_in(inbox)
        started = time.monotonic()
        batch = self.scheduler.schedule()
        failures = self._step(batch)
        finished = self.scheduler.complete_step(batch, self.engine.remaining(batch))
        decoded, broken = self.engine.decode(finished)
        self.telemetry.turned(time.monotonic() - started, self.engine.num_out_of_memory)
        self._hand_over(decoded, [*failures, *broken])

    def _capacity(self) -> Capacity:
        """Room for new jobs; none while the blob store cannot keep up."""
        if self.stopping or self.output.pending >= self.scheduler.max_running:
            return FULL
        return self.scheduler.free_capacity()

    def _take_in(self, inbox: Inbox) -> None:
        """Drop and start; a job that came and was lost again during one step is not begun."""
        self._drop(inbox.dropped)
        lost = set(inbox.dropped)
        self._start([arrival for arrival in inbox.arrivals if arrival.claim.key not in lost])

    def _drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.scheduler.abort(key)
            self.engine.abort(key)

    def _start(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            if self.stopping:
                self.intake.release(arrival.claim)
                continue
            prepared = self.engine.prepare(arrival.claim, arrival.claimed_at)
            if isinstance(prepared, Failure):
                self._hand_over([], [prepared])
                continue
            self.scheduler.add(prepared)
            self.intake.report(prepared.key, 0, prepared.steps_left)

    def _step(self, batch: StepBatch) -> list[Failure]:
        states = [self.engine.job(key).state for key in batch.keys]
        size = sum(s.num_sequences for s in states), sum(s.num_tokens for s in states)
        started = time.monotonic()
        failures = self.engine.step(batch)
        if batch.keys:
            self._step_s = time.monotonic() - started
            self.telemetry.stepped(*size, self._step_s)
            self._count_recompiles()
        failed = {failure.claim.key for failure in failures}
        for key in batch.keys:
            if key not in failed:
                self.intake.report(key, *self.engine.progress(key))
                self.previews.step_done(self.engine.job(key))
        return failures

    def _count_recompiles(self) -> None:
        """Notice what the warm-up should have compiled: it stops everybody for seconds."""
        more = compiled_graphs() - self._graphs - self.num_recompiles
        if more:
            self.num_recompiles += more
            log.warning("recompiled after warm-up", graphs=more, step_s=round(self._step_s, 3))

    def _hand_over(self, decoded: Sequence[Decoded], failures: Sequence[Failure]) -> None:
        for each in decoded:
            self.output.submit(each, self.previews.partials(each.job.claim))
        for failure in failures:
            log.info("job failed", job=failure.claim.job_id, code=failure.error.code)
            self.intake.fail(failure.claim, failure.error, failure.retry)

    def _drain(self, deadline: float) -> None:
        """Finish what can be finished by `deadline` (monotonic), release the rest, sign off."""
        log.info("draining", running=len(self.scheduler), storing=self.output.pending)
        self.intake.stop_claiming(GOODBYE_S)
        released = [self._release(claim) for claim in self._too_long(deadline)]
        while (len(self.scheduler) or self.output.pending) and time.monotonic() < deadline:
            self.turn()
        self.previews.stop()
        self.turn_away()
        released += [self._release(claim) for claim in self.engine.claims()]
        released += [self.intake.release(claim) for claim in self.output.stop()]
        concurrent.futures.wait(released, timeout=GOODBYE_S)
        self.intake.stop(GOODBYE_S)
        log.info("drained", released=len(released))

    def turn_away(self) -> None:
        """Hand back whatever was claimed but not started."""
        self._take_in(self.intake.poll(FULL))

    def _too_long(self, deadline: float) -> list[Claim]:
        """Claims whose remaining steps, at the pace of the last one, end after `deadline`."""
        left_s = deadline - time.monotonic()
        late = []
        for claim in self.engine.claims():
            step, total = self.engine.progress(claim.key)
            if (total - step) * self._step_s > left_s:
                late.append(claim)
        return late

    def _release(self, claim: Claim) -> "concurrent.futures.Future[bool]":
        self._drop([claim.key])
        return self.intake.release(claim)


def run_worker(
    settings: Settings,
    model_dir: Path,
    *,
    pool: str = DEFAULT_POOL,
    worker_id: str | None = None,
    load: Callable[[Path, str], LoadedModel] = load_model,
    token_fd: int | None = None,
) -> int:
    """Serve jobs of `pool` with the checkpoint in `model_dir` until SIGTERM or SIGINT.

    `token_fd` is a pipe that several workers share: only the one that finds a byte in it says why
    their common checkpoint cannot be served.

    Returns the exit code 2 when the checkpoint cannot be served, 3 when loading it failed for
    another reason (with one line on stderr each); an orderly stop ends the process with 0. Must be
    called from the main thread.
    """
    worker_id = worker_id or f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
    configure_logging(settings.log_level, worker=worker_id, pool=pool)
    for number in (signal.SIGTERM, signal.SIGINT):
        # While loading there is nothing to hand back.
        signal.signal(number, lambda *_: _leave_at_once())
    pulse = Pulse()
    probes = Probes()
    open_probes(settings, probes)
    started = time.monotonic()
    try:
        credentials = open_credentials(settings.c2pa_cert, settings.c2pa_key)
        model = load(model_dir, settings.precision)
        pulse.beat()
        # Refuses what no part alone can see, such as an impossible default. Its stages are the
        # first by which later ones are judged.
        warm = warm_up(model, settings.warmup, pulse.beat)
    except (ValueError, OSError) as error:
        _say_once(f"lumina worker: {_one_line(error)}", token_fd)
        return MISUSE
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        what = f"{type(error).__name__}: {_one_line(error)}"
        print(f"lumina worker: loading failed: {what}", file=sys.stderr, flush=True)
        return LOAD_FAULT
    info = warm.info
    load_s = round(time.monotonic() - started, 2)
    log.info("model loaded", model=info.name, hash=info.hash, load_s=load_s, **model.arithmetic)
    telemetry = Telemetry(pool, worker_id)
    telemetry.loaded(info, load_s)
    intake = Intake(lambda: open_queue(settings), worker_id, pool, pulse)
    blobs = BlobStore(settings.blob_store_url)
    output = Output(intake, blobs, info.name, info.hash, credentials, telemetry.finished)
    worker = _make_worker(settings, model, warm, intake, pulse, output, telemetry)
    _stop_on_signals(worker)
    intake.start(info)
    probes.alive, probes.ready = (lambda: not pulse.hung()), (lambda: intake.ready)
    probes.started = True
    worker.run(settings.drain_s)
    _leave_at_once()
    return 0


def _make_worker(
    settings: Settings,
    model: LoadedModel,
    warm: WarmUp,
    intake: Intake,
    pulse: Pulse,
    output: Output,
    telemetry: Telemetry,
) -> Worker:
    """A worker whose scheduler knows what the warm-up measured."""
    costs = {"cost": dataclasses.asdict(warm.cost), "memory": dataclasses.asdict(warm.memory)}
    log.info("warmed up", graphs=compiled_graphs(), **costs)
    scheduler = Scheduler(
        max_running=settings.max_running,
        max_step_tokens=settings.max_step_tokens,
        budget=StepBudget(settings.max_step_tokens, warm.cost, warm.memory),
    )
    engine = Engine(model.pipeline, pulse.beat, scheduler.out_of_memory)
    return Worker(scheduler, engine, intake, output, pulse, model.painter, telemetry)


def _stop_on_signals(worker: Worker) -> None:
    """The first signal drains the worker, a second one ends it at once."""

    def stop(number: int, _: FrameType | None) -> None:
        worker.stopping = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _leave_at_once() -> None:
    """End the process without the interpreter's teardown, which with torch can take seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _say_once(line: str, token_fd: int | None) -> None:
    if token_fd is not None:
        try:
            mine = os.read(token_fd, 1)
        except BlockingIOError:  # another worker has said it
            mine = b""
        if not mine:
            return
    print(line, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
