"""Who steps together: the oldest first, and with them everything that fits the token budget."""

from collections.abc import Sequence

from server.scheduler.request import RunningRequest


def choose(waiting: Sequence[RunningRequest], max_tokens: int) -> list[RunningRequest]:
    """Return the requests of the next step, at least one if any waits.

    Args:
        waiting: oldest first.
        max_tokens: tokens of one packed forward. The oldest always steps, whatever its size; a
            smaller younger request may take the room that a larger one does not fit.
    """
    chosen: list[RunningRequest] = []
    used = 0
    for request in waiting:
        if not chosen or used + request.num_tokens <= max_tokens:
            chosen.append(request)
            used += request.num_tokens
    return chosen
