"""What a worker tells Prometheus of its steps, jobs and device."""

import sys
import time

from server import metrics
from server.protocol import JobResult, ModelInfo
from server.worker.memory import host_memory

WINDOW_S = 5.0  # how often the gauges of the device are renewed


class Telemetry:
    """The series of one worker (`server/metrics.py` says what each means).

    Args:
        pool: whose jobs it runs.
        worker_id: names it among the workers of the pool.
    """

    def __init__(self, pool: str, worker_id: str) -> None:
        self._pool, self._worker_id = pool, worker_id
        self._busy_s = 0.0
        self._out_of_memory = 0
        self._window_from = time.monotonic()

    def loaded(self, info: ModelInfo, load_s: float) -> None:
        """Say what is served, and make the series of the pool."""
        metrics.declare()
        metrics.declare_pool(self._pool)
        metrics.model_info.labels(self._pool, info.name, info.hash).set(1)
        metrics.model_load.labels(self._pool, self._worker_id).set(load_s)
        self._renew_gauges(0.0)

    def stepped(self, num_sequences: int, num_tokens: int, took_s: float) -> None:
        """Count one packed forward; without sequences it was a step that a cache skipped whole."""
        metrics.step.labels(self._pool).observe(took_s)
        if num_sequences:
            metrics.batch_sequences.labels(self._pool).observe(num_sequences)
            metrics.batch_tokens.labels(self._pool).observe(num_tokens)

    def turned(self, busy_s: float, num_out_of_memory: int) -> None:
        """Note a turn of the worker's loop: the seconds that the device was at work in it, and how
        often its memory has not sufficed so far."""
        self._busy_s += busy_s
        if num_out_of_memory > self._out_of_memory:
            metrics.oom.labels(self._pool).inc(num_out_of_memory - self._out_of_memory)
            self._out_of_memory = num_out_of_memory
        passed = time.monotonic() - self._window_from
        if passed >= WINDOW_S:
            self._renew_gauges(min(1.0, self._busy_s / passed))
            self._busy_s, self._window_from = 0.0, time.monotonic()

    def finished(self, result: JobResult) -> None:
        """Count a job whose result stands."""
        pool, timings, first = self._pool, result.timings, result.images[0]
        metrics.queue_wait.labels(pool).observe(timings.queue_s)
        metrics.e2e.labels(pool, metrics.size_class(first.width, first.height)).observe(
            timings.total_s
        )
        for stage in metrics.STAGES:
            metrics.stage.labels(pool, stage).observe(getattr(timings, f"{stage}_s"))
        metrics.steps.labels(pool, "computed").inc(result.steps.computed)
        metrics.steps.labels(pool, "skipped").inc(result.steps.skipped)
        metrics.cfg_branches.labels(pool).inc(result.steps.nfe * len(result.images))
        metrics.images.labels(pool).inc(len(result.images))
        metrics.pixels.labels(pool).inc(sum(image.width * image.height for image in result.images))

    def _renew_gauges(self, busy: float) -> None:
        metrics.device_busy.labels(self._pool, self._worker_id).set(busy)
        for kind, value in device_memory().items():
            metrics.device_memory.labels(self._pool, self._worker_id, kind).set(value)


def device_memory() -> dict[str, int]:
    """Bytes of device memory by kind; on a CPU the resident set stands for all of it.

    `allocated` is held by tensors, `reserved` by the allocator, `total` is the device's.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        _, total = torch.cuda.mem_get_info()
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "total": total,
        }
    resident, total = host_memory()
    return {"allocated": resident, "reserved": resident, "total": total}
