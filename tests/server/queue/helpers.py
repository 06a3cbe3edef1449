"""Short ways to say what the queue tests say often."""

from server.protocol import JobError, JobResult, JobSpec, StepCounts, Timings, new_job_id

POOL = "default"
BOOM = JobError(code="internal", detail="boom")
RESULT = JobResult(
    images=(),
    timings=Timings(queue_s=0, encode_s=0, denoise_s=0, decode_s=0, store_s=0, total_s=0),
    steps=StepCounts(computed=4, skipped=0, cfg=4),
    warnings=(),
    model="fake",
)


def spec(prompt="a red circle", **fields):
    return JobSpec(prompt=prompt, seed=1, **fields)


async def submit(queue, **options):
    return (await queue.submit(new_job_id(), spec(), **options)).id


async def claim(queue, worker="w1", max_jobs=1, max_cost=1e9, idle=True):
    return await queue.claim(worker, POOL, max_jobs, max_cost, idle=idle)


async def claim_one(queue, worker="w1"):
    (only,) = await claim(queue, worker)
    return only


async def pass_time(queue, clock, seconds):
    """Let time pass as it does in production, with a reaper; returns the jobs taken back."""
    taken = 0
    while seconds > 0:
        clock.advance(min(1.0, seconds))
        taken += await queue.reap()
        seconds -= 1.0
    return taken
