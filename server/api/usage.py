"""`GET /usage`: what the caller has used today, what it may, and when that begins anew."""

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request

from server.api.answers import rfc3339
from server.api.auth import Caller, caller
from server.api.context import ApiContext, context_of, promptly
from server.api.examples import USAGE
from server.api.openapi import QUEUE, answer, problems
from server.api.rates import Standing

router = APIRouter()


class Allowance(BaseModel):
    """Something countable: used, the limit and what is left of it; null means no limit."""

    used: int
    limit: int | None
    remaining: int | None


class JobsToday(Allowance):
    """Jobs submitted on this UTC day, by any key of the tenant."""

    device_s: float = Field(description="estimated seconds of a device for them")
    resets_in_s: int
    resets_at: str = Field(description="RFC 3339, UTC")


class Requests(Allowance):
    """Requests of this key in the current window."""

    window_s: int
    resets_in_s: int


class UsageAnswer(BaseModel):
    """What `GET /usage` says."""

    tenant: str
    key: str | None = Field(description="id of the API key; null where keys are not required")
    scopes: list[str]
    weight: int
    jobs_today: JobsToday
    open_jobs: Allowance = Field(description="jobs that have not ended")
    requests: Requests | None = Field(description="null where the key has no rate")


@router.get(
    "/usage",
    summary="What you have used, and what you may",
    responses=problems(*QUEUE) | {200: answer("What was used, and the limits", USAGE)},
)
async def usage(request: Request) -> UsageAnswer:
    """Jobs of today and open jobs of the caller's tenant, requests of its key, and their limits."""
    return await promptly(_usage(context_of(request), caller(request)))


async def _usage(context: ApiContext, who: Caller) -> UsageAnswer:
    queue, limits = context.queue, who.limits
    today = await queue.usage(who.tenant)
    open_now = await queue.open_jobs(who.tenant)
    open_limit = queue.tenant_limit if limits.open_jobs is None else limits.open_jobs
    rate = await context.rates.requests(who.key) if who.key else None
    return UsageAnswer(
        tenant=who.tenant,
        key=who.key.id if who.key else None,
        scopes=sorted(who.scopes),
        weight=limits.weight,
        jobs_today=JobsToday(
            used=today.jobs,
            limit=limits.daily_jobs,
            remaining=_left(today.jobs, limits.daily_jobs),
            device_s=today.cost_ms / 1000,
            resets_in_s=today.resets_in_s,
            resets_at=rfc3339(today.resets_ms),
        ),
        open_jobs=Allowance(used=open_now, limit=open_limit, remaining=_left(open_now, open_limit)),
        requests=_requests(rate) if rate else None,
    )


def _requests(rate: Standing) -> Requests:
    return Requests(
        used=rate.limit - rate.remaining,
        limit=rate.limit,
        remaining=rate.remaining,
        window_s=rate.window_s,
        resets_in_s=rate.reset_s,
    )


def _left(used: int, limit: int | None) -> int | None:
    return None if limit is None else max(0, limit - used)
