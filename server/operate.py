"""`lumina dead` and `lumina epoch`: what an operator does to a running queue."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.protocol import JobRecord
    from server.queue.jobs import JobQueue

dead_app = typer.Typer(help="Jobs that used up their attempts.", no_args_is_help=True)
epoch_app = typer.Typer(help="The history that Redis holds.", no_args_is_help=True)

RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="Redis to use, as redis://, rediss://, unix:// or sentinel://.", show_default=False
    ),
]
JobIds = Annotated[list[str] | None, typer.Argument(help="Job ids.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="Every dead job.")]
MAX_DEAD = 10_000


def _with_queue(redis_url: str | None, act: "Callable[[JobQueue], Awaitable[int]]") -> int:
    from server.config import load_settings
    from server.queue.jobs import open_queue

    async def main() -> int:
        queue = open_queue(load_settings(redis_url=redis_url))
        try:
            return await act(queue)
        finally:
            await queue.close()

    return asyncio.run(main())


async def _chosen(queue: "JobQueue", job_ids: list[str] | None, everything: bool) -> list[str]:
    from server.queue.dead import DeadLetters

    if bool(job_ids) == everything:
        raise ValueError("give either job ids or --all")
    return await DeadLetters(queue).ids(MAX_DEAD) if everything else list(job_ids or ())


def _line(record: "JobRecord") -> str:
    ended = datetime.fromtimestamp((record.finished_ms or 0) / 1000, UTC)
    code = record.error.code if record.error else "-"
    when = ended.isoformat(timespec="seconds").replace("+00:00", "Z")
    return f"{record.id}  {when}  {record.pool}  {record.tenant}  {record.attempts}  {code}"


@dead_app.command("list")
def list_dead(
    limit: Annotated[int, typer.Option(min=1, max=MAX_DEAD, help="At most so many.")] = 100,
    redis_url: RedisUrl = None,
) -> int:
    """List dead jobs, the latest first: id, end, pool, tenant, attempts, error."""

    async def act(queue: "JobQueue") -> int:
        from server.queue.dead import DeadLetters

        for record in await DeadLetters(queue).records(limit):
            print(_line(record))
        return 0

    return _with_queue(redis_url, act)


@dead_app.command("show")
def show_dead(
    job_id: Annotated[str, typer.Argument(help="Job id.")], redis_url: RedisUrl = None
) -> int:
    """Show one job: what it asked for and why it died. This prints its prompt."""

    async def act(queue: "JobQueue") -> int:
        record = await queue.get(job_id)
        if record is None:
            raise ValueError(f"there is no job {job_id}")
        print(_line(record))
        print(f"error  {record.error.detail if record.error else '-'}")
        print(f"spec   {record.spec.to_json()}")
        return 0

    return _with_queue(redis_url, act)


@dead_app.command("retry")
def retry_dead(job_ids: JobIds = None, everything: All = False, redis_url: RedisUrl = None) -> int:
    """Queue a new job for each dead one; prints the old and the new id."""

    async def act(queue: "JobQueue") -> int:
        from server.queue.dead import DeadLetters

        failed = 0
        for old in await _chosen(queue, job_ids, everything):
            new = await DeadLetters(queue).retry(old)
            failed += new is None
            print(f"{old}  {new or 'is not among the dead'}")
        return 1 if failed else 0

    return _with_queue(redis_url, act)


@dead_app.command("purge")
def purge_dead(job_ids: JobIds = None, everything: All = False, redis_url: RedisUrl = None) -> int:
    """Forget dead jobs and their records."""

    async def act(queue: "JobQueue") -> int:
        from server.queue.dead import DeadLetters

        purged = await DeadLetters(queue).purge(*await _chosen(queue, job_ids, everything))
        print(f"{purged} purged")
        return 0

    return _with_queue(redis_url, act)


@epoch_app.command("show")
def show_epoch(redis_url: RedisUrl = None) -> int:
    """Say which history Redis holds; exit code 1 if a process noticed that data were lost."""

    async def act(queue: "JobQueue") -> int:
        epoch, lost = await queue.epoch()
        print(f"epoch {epoch or 'none yet'}: {lost or 'no data lost'}")
        return 1 if lost else 0

    return _with_queue(redis_url, act)


@epoch_app.command("accept")
def accept_epoch(redis_url: RedisUrl = None) -> int:
    """Go on without the data that were lost: processes become ready again."""

    async def act(queue: "JobQueue") -> int:
        print(f"epoch {await queue.accept_epoch()}: accepted")
        return 0

    return _with_queue(redis_url, act)
