"""Every Prometheus series of the service, in one place (docs/operations.md is for operators).

Names, labels and units are fixed: dashboards and rules of others read them. No label ever holds a
tenant, a prompt or a job. Every series of a known pool exists from the start, so that a rule never
meets an absent one. A gauge of the queue is the same in every process that tells it: aggregate by
`max`.

Where several processes share one `/metrics` (`lumina serve`), each keeps its values in files of the
folder PROMETHEUS_MULTIPROC_DIR, which must be in the environment before this module is imported.
"""

import os
from collections.abc import Iterable
from importlib import metadata

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "lumina_"
MEDIA_TYPE = CONTENT_TYPE_LATEST

STAGES = ("encode", "denoise", "decode", "store")
ENDED = ("succeeded", "failed", "canceled", "expired")
SIZE_CLASSES = ("<=512", "<=1024", ">1024")

# From a probe's millisecond to a synchronous call that waits its five minutes.
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# From a 64 px picture on a CPU to hours in a backlog.
JOB_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 900, 3600)
STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.3, 2.6, 5, 10)
SEQUENCE_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
TOKEN_BUCKETS = tuple(float(2**exponent) for exponent in range(5, 19))
SCRIPT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(PREFIX + name, text, labels)


def _histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
    return Histogram(PREFIX + name, text, labels, buckets=tuple(buckets))


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    """A gauge whose value ends with the process that told it."""
    return Gauge(PREFIX + name, text, labels, multiprocess_mode="livemax")


http_requests = _counter(
    "http_requests_total", "HTTP requests answered.", "route", "method", "code"
)
http_request_duration = _histogram(
    "http_request_duration_seconds",
    "From the first byte of a request to the last of its answer.",
    HTTP_BUCKETS,
    "route",
    "method",
    "code",
)
build_info = _gauge("build_info", "1; what is running.", "version", "git")
model_info = _gauge("model_info", "1; what a pool serves.", "pool", "model", "hash")

jobs_submitted = _counter("jobs_submitted_total", "Jobs accepted.", "pool")
jobs_rejected = _counter("jobs_rejected_total", "Submissions refused for want of room.", "reason")
jobs_finished = _counter("jobs_finished_total", "Jobs that ended.", "pool", "status", "error")

queue_depth = _gauge("queue_depth", "Queued jobs.", "pool", "priority")
queue_depth_limit = _gauge("queue_depth_limit", "Queued jobs a pool may hold.", "pool")
queue_oldest_age = _gauge(
    "queue_oldest_age_seconds", "Age of the oldest queued job; 0 without one.", "pool", "priority"
)
queue_work = _gauge(
    "queue_work_seconds", "Estimated device time of the queued jobs.", "pool", "priority"
)
jobs_running = _gauge("jobs_running", "Jobs that a worker holds.", "pool", "priority")

queue_wait = _histogram(
    "queue_wait_seconds", "From submission to the last claim.", JOB_BUCKETS, "pool"
)
e2e = _histogram(
    "e2e_seconds", "From submission to the stored picture.", JOB_BUCKETS, "pool", "size"
)
stage = _histogram("stage_seconds", "Time of a job in a stage.", STAGE_BUCKETS, "pool", "stage")

batch_sequences = _histogram(
    "batch_sequences", "Sequences in one packed forward.", SEQUENCE_BUCKETS, "pool"
)
batch_tokens = _histogram("batch_tokens", "Tokens in one packed forward.", TOKEN_BUCKETS, "pool")
step = _histogram("step_seconds", "Time of one denoising step of a batch.", STEP_BUCKETS, "pool")
steps = _counter("steps_total", "Denoising steps of finished jobs.", "pool", "kind")
cfg_branches = _counter("cfg_branches_total", "Branches whose joint blocks ran.", "pool")
images = _counter("images_total", "Pictures stored.", "pool")
pixels = _counter("pixels_total", "Pixels of the pictures stored.", "pool")

leases_lost = _counter("leases_lost_total", "Claims that were taken from their worker.", "pool")
jobs_reclaimed = _counter("jobs_reclaimed_total", "Jobs taken back from silent workers.", "pool")
fenced_writes = _counter("fenced_writes_total", "Writes under an old claim, refused.", "pool")
dead_jobs = _gauge("dead_jobs", "Jobs that used up their attempts.", "pool")

worker_last_claim = _gauge(
    "worker_last_claim_timestamp_seconds", "When the claim loop last came round.", "pool", "worker"
)
workers_live = _gauge("workers_live", "Workers that take work.", "pool")
model_load = _gauge("model_load_seconds", "What loading the model took.", "pool", "worker")
oom = _counter("oom_total", "Times the device's memory did not suffice.", "pool")
device_memory = _gauge("device_memory_bytes", "Device memory.", "pool", "worker", "kind")
device_busy = _gauge(
    "device_busy_ratio", "Share of the last seconds spent in steps and decoding.", "pool", "worker"
)

redis_script = _histogram(
    "redis_script_seconds", "Time of a queue script, its round trip included.", SCRIPT_BUCKETS,
    "script",
)  # fmt: skip
redis_errors = _counter("redis_errors_total", "Calls of Redis that failed.", "kind")
redis_memory_ratio = _gauge("redis_memory_ratio", "Redis's memory over its limit; 0 without one.")
redis_persistence_ok = _gauge("redis_persistence_ok", "1 while Redis can write what it must keep.")
epoch_ok = _gauge("epoch_ok", "0 once acknowledged data were lost and nobody has accepted it.")

blob_errors = _counter("blob_errors_total", "Calls of the blob store that failed.", "op")
webhook_deliveries = _counter("webhook_deliveries_total", "Webhooks tried.", "result")
webhook_outbox = _gauge("webhook_outbox", "Webhooks that wait to be delivered.")

REJECTIONS = (
    "too-many-jobs", "queue-full", "deadline-too-short", "data-lost", "queue-unavailable",
    "model-not-ready", "rate-limited", "quota-exceeded",
)  # fmt: skip
REDIS_ERRORS = ("unreachable", "silent", "refused")
BLOB_OPS = ("put", "get")
DELIVERIES = ("delivered", "retry", "given-up")


def size_class(width: int, height: int) -> str:
    """The size class of a picture, by its longer side in pixels."""
    side = max(width, height)
    return SIZE_CLASSES[0] if side <= 512 else SIZE_CLASSES[1] if side <= 1024 else SIZE_CLASSES[2]


def declare(scripts: Iterable[str] = ()) -> None:
    """Make the series that belong to no pool, and those that say what is running."""
    build_info.labels(metadata.version("lumina-serve"), os.environ.get("LUMINA_GIT", "")).set(1)
    for metric, values in (
        (jobs_rejected, REJECTIONS),
        (redis_errors, REDIS_ERRORS),
        (blob_errors, BLOB_OPS),
        (webhook_deliveries, DELIVERIES),
        (redis_script, scripts),
    ):
        for value in values:
            metric.labels(value)


def declare_pool(pool: str) -> None:
    """Make the counters and histograms of a pool; its gauges come with their first values."""
    for metric in (
        jobs_submitted, queue_wait, batch_sequences, batch_tokens, step, cfg_branches, images,
        pixels, leases_lost, jobs_reclaimed, fenced_writes, oom,
    ):  # fmt: skip
        metric.labels(pool)
    for name in STAGES:
        stage.labels(pool, name)
    for size in SIZE_CLASSES:
        e2e.labels(pool, size)
    for kind in ("computed", "skipped"):
        steps.labels(pool, kind)
    for status in ENDED:
        jobs_finished.labels(pool, status, "")


def shared_folder() -> str | None:
    """Where the processes that share one `/metrics` keep their values; None for a process alone."""
    return os.environ.get(FOLDER_VARIABLE) or None


def exposition() -> bytes:
    """What `/metrics` answers: this process's series, or those of all that share the folder."""
    if shared_folder() is None:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def forget_process(pid: int, folder: str) -> None:
    """Drop the gauges of a process that shared `folder` and has ended; its counters stay."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
