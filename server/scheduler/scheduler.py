"""The scheduler: decides which running requests step together, and what may still be claimed.

It works on ids and costs; the engine does the computing. `schedule` and `complete_step` alternate:
requests join and leave only between steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.scheduler.policy import choose
from server.scheduler.request import Phase, RunningRequest


@dataclass(frozen=True)
class StepBatch:
    """The requests that advance by one denoising step now, by key."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Capacity:
    """What a worker may claim now; `idle` says that it runs nothing."""

    jobs: int
    cost_ms: float
    idle: bool


@dataclass(frozen=True)
class Remaining:
    """What a request still needs: tokens of its next step, and steps."""

    num_tokens: int
    steps: int


class Scheduler:
    """Running requests in the order of their arrival.

    Args:
        max_running: requests held at once.
        max_step_tokens: tokens of one packed forward; a larger request steps alone.
        max_cost_ms: device time to hold at once; the rest stays in the queue, for other workers.
    """

    def __init__(
        self, *, max_running: int, max_step_tokens: int, max_cost_ms: float = 60_000.0
    ) -> None:
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.max_cost_ms = max_cost_ms
        self._requests: dict[str, RunningRequest] = {}
        self._left_out = False

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: str) -> bool:
        return key in self._requests

    def add(self, request: RunningRequest) -> None:
        """Take a prepared request; it steps from the next `schedule` on."""
        assert request.key not in self._requests, request.key
        self._requests[request.key] = request

    def abort(self, key: str) -> bool:
        """Forget a request between steps; whether it was here."""
        return self._requests.pop(key, None) is not None

    def schedule(self) -> StepBatch:
        """Choose who steps now; empty when nothing runs."""
        chosen = choose(list(self._requests.values()), self.max_step_tokens)
        self._left_out = len(chosen) < len(self._requests)
        for request in chosen:
            request.begin_step()
        return StepBatch(tuple(request.key for request in chosen))

    def complete_step(self, batch: StepBatch, remaining: Mapping[str, Remaining]) -> Sequence[str]:
        """Record the step; a request of the batch that is not in `remaining` has failed.

        Returns the keys of those that took their last step; they and the failed ones are gone.
        """
        finished = []
        for key in batch.keys:
            if key not in remaining:
                del self._requests[key]
                continue
            request = self._requests[key]
            request.end_step(remaining[key].num_tokens, remaining[key].steps)
            if request.phase is Phase.FINISHED:
                finished.append(key)
                del self._requests[key]
        return finished

    def free_capacity(self) -> Capacity:
        """What may be claimed: nothing beside a solo request or while somebody waits for room."""
        held = self._requests.values()
        if self._left_out or any(request.solo for request in held):
            return Capacity(jobs=0, cost_ms=0.0, idle=False)
        cost_ms = self.max_cost_ms - sum(request.cost_ms for request in held)
        room = self.max_running - len(held)
        return Capacity(jobs=room if cost_ms > 0 else 0, cost_ms=max(0.0, cost_ms), idle=not held)
