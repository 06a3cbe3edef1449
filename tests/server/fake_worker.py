"""A worker without a model: claims jobs from the real queue and answers with a plain picture."""

import asyncio
import dataclasses
import hashlib
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI
from PIL import Image

from server.api.app import create_app
from server.config import Settings
from server.protocol import (
    DEFAULT_POOL,
    ImageRef,
    JobError,
    JobResult,
    JobSpec,
    ModelInfo,
    StepCounts,
    Timings,
)
from server.queue.blobs import BlobStore, image_path
from server.queue.connection import end_tasks
from server.queue.jobs import Claim, JobQueue, open_queue

MODEL = ModelInfo(
    name="demo",
    hash="0" * 64,
    min_size=64,
    max_size=128,
    size_multiple=16,
    default_width=128,
    default_height=128,
    max_steps=50,
    default_steps=20,
    max_prompt_tokens=64,
    step_cost_ms=10.0,
    defaults={"guidance_scale": 4.0},
    presets={"fast": {"num_inference_steps": 8}, "flow": {"sampler": "dpm"}},
    templates=("real",),
    loras=("ink", "wool"),
)


def draw(spec: JobSpec, index: int) -> bytes:
    """A picture of one colour that depends on the seed, in the format asked for."""
    digest = hashlib.sha256(f"{spec.prompt} {spec.seed + index}".encode()).digest()
    picture = Image.new("RGB", (spec.width or 128, spec.height or 128), tuple(digest[:3]))
    data = io.BytesIO()
    picture.save(data, spec.output_format)
    return data.getvalue()


class FakeWorker:
    """Runs jobs one after another; a prompt that starts with "fail" or "hang" does just that."""

    def __init__(self, queue: JobQueue, blobs: BlobStore) -> None:
        self.queue = queue
        self.blobs = blobs

    async def run(self) -> None:
        await self.queue.publish_model(DEFAULT_POOL, MODEL)
        while True:
            await self.queue.heartbeat("fake-1", DEFAULT_POOL, [])
            for claim in await self.queue.claim("fake-1", DEFAULT_POOL, 1, 1e12):
                await self.work(claim)
            await asyncio.sleep(0.01)

    async def work(self, claim: Claim) -> None:
        spec = claim.spec
        if spec.prompt.startswith("fail"):
            code = spec.prompt.removeprefix("fail").strip() or "broken"
            await self.queue.fail(claim, JobError(code=code, detail="It broke."), retry=False)
            return
        total = spec.num_inference_steps or MODEL.default_steps
        step = 0
        while await self.queue.progress(claim, step, total) == "held":
            if step == total:
                await self.commit(claim)
                return
            await self.show(claim, step, total)
            step += 0 if spec.prompt.startswith("hang") and step == 1 else 1
            await asyncio.sleep(0.001)

    async def show(self, claim: Claim, step: int, total: int) -> None:
        """Keep the partial pictures that are due after a step: they change with it."""
        spec = claim.spec
        parts = spec.partial_images + 1
        for number in range(spec.partial_images):
            for image in range(spec.num_images if step == total * (number + 1) // parts else 0):
                half_done = dataclasses.replace(spec, seed=spec.seed + step, output_format="jpeg")
                await self.queue.put_partial(claim, image, number, draw(half_done, 1000 * image))

    async def commit(self, claim: Claim) -> None:
        spec = claim.spec
        images = []
        for index in range(spec.num_images):
            path = image_path(claim.tenant, claim.job_id, claim.claim_no, index, spec.output_format)
            images.append(
                ImageRef(
                    path=path,
                    sha256=self.blobs.put(path, draw(spec, index)),
                    width=spec.width or MODEL.default_width,
                    height=spec.height or MODEL.default_height,
                    seed=spec.seed + index,
                    format=spec.output_format,
                )
            )
        result = JobResult(
            images=tuple(images),
            timings=Timings(
                queue_s=0.1, encode_s=0.0, denoise_s=0.2, decode_s=0.0, store_s=0.0, total_s=0.3
            ),
            steps=StepCounts(computed=20, skipped=0, cfg=20, nfe=40),
            warnings=("a warning",) if spec.prompt == "warn" else (),
            model=MODEL.name,
            prompt_tokens=len(spec.prompt.split()),
        )
        await self.queue.complete(claim, result)


class Service:
    """The application in this process, its worker, and a client that talks to it."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient, queue: JobQueue) -> None:
        self.app = app
        self.client = client
        self.queue = queue

    async def generate(self, body: object, **headers: str) -> httpx.Response:
        """POST `body` as JSON; underscores in header names become dashes."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/generate", json=body, headers=named)

    async def until(self, job_id: str, *statuses: str) -> dict[str, object]:
        """Poll a job until it has one of the statuses."""
        async with asyncio.timeout(10):
            while True:
                job: dict[str, object] = (await self.client.get(f"/jobs/{job_id}")).json()
                if job["status"] in statuses:
                    return job
                await asyncio.sleep(0.01)


def service_settings(redis_url: str, folder: Path, **changes: object) -> Settings:
    """Settings of a test service; `changes` override."""
    values = {"redis_url": redis_url, "data_dir": folder, **changes}
    return Settings.model_validate(values)


@asynccontextmanager
async def running_worker(settings: Settings) -> AsyncIterator[JobQueue]:
    """A fake worker that has published its model; yields its queue."""
    queue = open_queue(settings)
    task = asyncio.create_task(FakeWorker(queue, BlobStore(settings.blob_store_url)).run())
    try:
        while await queue.model_info(DEFAULT_POOL) is None and not task.done():
            await asyncio.sleep(0.01)
        yield queue
    finally:
        await end_tasks(task)
        await queue.close()


@asynccontextmanager
async def service(
    redis_url: str, folder: Path, *, worker: bool = True, **options: object
) -> AsyncIterator[Service]:
    """A whole service. `options` go to `create_app`, except `settings`: a dict for Settings."""
    changes = options.pop("settings", {})
    assert isinstance(changes, dict)
    settings = service_settings(redis_url, folder, **changes)
    app = create_app(settings, **options)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30) as client,
    ):
        if not worker:
            yield Service(app, client, app.state.context.queue)
            return
        async with running_worker(settings) as queue:
            yield Service(app, client, queue)
