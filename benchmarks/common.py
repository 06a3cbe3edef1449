"""What the benchmarks share: the demo's mixed requests, the engine without a queue."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from model import GenerationRequest
from model.pipeline import Pipeline
from server.config import Settings
from server.protocol import JobSpec
from server.queue.jobs import Claim
from server.scheduler.scheduler import Scheduler
from server.worker.engine import Engine, Failure

_LIMITS = ("max_running", "max_step_tokens")  # of a worker, as it comes
_THINGS = ("red circle", "blue square", "green star", "yellow cross", "purple triangle")
_SIZES = ((64, 64), (128, 128), (96, 64), (64, 64), (128, 96), (64, 128), (128, 128), (96, 96))
_STEPS = (30, 20, 30, 16, 24, 30, 20, 30)


def mixed_requests(count: int, first_seed: int, **settings: Any) -> list[GenerationRequest]:
    """Requests of several sizes, step counts and prompts; no two of different seeds are alike."""
    requests = []
    for index in range(count):
        width, height = _SIZES[index % len(_SIZES)]
        one, two = _THINGS[index % 5], _THINGS[(index + 1 + index // 5) % 5]
        requests.append(
            GenerationRequest(
                f"a {one} to the left of a {two}, take {first_seed + index}",
                seed=first_seed + index,
                width=width,
                height=height,
                num_inference_steps=_STEPS[index % len(_STEPS)],
                **settings,
            )
        )
    return requests


def through_engine(
    pipeline: Pipeline, requests: Sequence[GenerationRequest]
) -> list[list[Image.Image]]:
    """Pictures of requests that arrive together, by a worker's loop; without queue and PNG."""
    engine = Engine(pipeline)
    limits = {name: Settings.model_fields[name].default for name in _LIMITS}
    scheduler = Scheduler(**limits)
    pictures: dict[str, list[Image.Image]] = {}
    for index, request in enumerate(requests):
        prepared = engine.prepare(claim_of(request, f"job{index}"), 0.0)
        assert not isinstance(prepared, Failure), prepared
        scheduler.add(prepared)
    while len(scheduler):
        batch = scheduler.schedule()
        failures = engine.step(batch)
        finished = scheduler.complete_step(batch, engine.remaining(batch))
        decoded, broken = engine.decode(finished)
        assert not [*failures, *broken], (failures, broken)
        pictures |= {each.job.claim.job_id: each.images for each in decoded}
    return [pictures[f"job{index}"] for index in range(len(requests))]


def claim_of(request: GenerationRequest, job_id: str) -> Claim:
    """The claim of a job that asks for this."""
    assert request.seed is not None
    spec = JobSpec(
        prompt=request.prompt,
        seed=request.seed,
        num_images=request.num_images,
        preset=request.preset,
        **request.settings,
    )
    return Claim(
        job_id=job_id, claim_no=1, worker="benchmark", attempts=1, tenant="benchmark",
        solo=False, waited_ms=0, cost_ms=1, spec=spec,
    )  # fmt: skip


def diffusers_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline on a checkpoint folder, silent."""
    from diffusers import Lumina2Pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = Lumina2Pipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    return reference
