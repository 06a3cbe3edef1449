"""`python -m tests.chaos.reader URL JOB AFTER`: prints a job's events as they happen."""

import asyncio
import sys

from server.queue.connection import connect
from server.queue.jobs import JobQueue


async def main(url: str, job_id: str, after: str) -> None:
    queue = JobQueue(connect(url))
    async for event in queue.follow(job_id, after):
        if event is not None:
            print(event.id, event.type, flush=True)
    await queue.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
