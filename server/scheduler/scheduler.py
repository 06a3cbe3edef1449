"""The scheduler: decides which running requests step together, and what may still be claimed.

It works on ids and costs; the engine does the computing. `schedule` and `complete_step` alternate:
requests join and leave only between steps. A request that is left out of a step has been preempted:
it keeps its state and waits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.scheduler.budget import StepBudget
from server.scheduler.policy import EarliestDue, Moment, Policy
from server.scheduler.request import RunningRequest, State, StepLoad

TYPICAL_MEMORY = 64  # the typical job is a mean over about so many
CLAIM_AT_ONCE = 4  # so that workers share a burst, rather than the first taking it all


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
    """What a request still needs: tokens and sequences of its next step, and steps."""

    num_tokens: int
    steps: int
    num_sequences: int = 1


class Scheduler:
    """Running requests, and who of them steps.

    Args:
        max_running: requests held at once.
        max_step_tokens: tokens of one packed forward; a larger request steps alone.
        max_cost_ms: device time to hold at once; the rest stays in the queue, for other workers.
        budget: costs and limits of a step; made from `max_step_tokens` if not given.
        policy: chooses who steps.
        clock: seconds, for ageing and deadlines.
    """

    def __init__(
        self,
        *,
        max_running: int,
        max_step_tokens: int,
        max_cost_ms: float = 60_000.0,
        budget: StepBudget | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_running = max_running
        self.max_cost_ms = max_cost_ms
        self.budget = budget or StepBudget(max_step_tokens)
        self._policy = policy or EarliestDue()
        self._clock = clock
        self._requests: dict[str, RunningRequest] = {}
        self._typical_ms = 0.0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, key: str) -> bool:
        return key in self._requests

    def add(self, request: RunningRequest) -> None:
        """Take a prepared request; it steps from the next `schedule` on."""
        assert request.key not in self._requests, request.key
        self._requests[request.key] = request
        request.solo_ms = self.budget.cost.step_ms(request.load)
        request.total_ms = request.steps_left * request.solo_ms
        self._num_added += 1
        share = 1 / min(self._num_added, TYPICAL_MEMORY)
        self._typical_ms += share * (request.total_ms - self._typical_ms)

    def abort(self, key: str) -> bool:
        """Forget a request between steps; whether it was here."""
        request = self._requests.pop(key, None)
        if request is not None:
            request.move(State.ABORTED)
        return request is not None

    def schedule(self) -> StepBatch:
        """Choose who steps now; empty when nothing runs."""
        if not self._requests:
            return StepBatch(())
        waiting = list(self._requests.values())
        moment = Moment(self._clock(), max(1e-3, self._typical_ms), self.held_bytes)
        chosen = self._policy.choose(waiting, self.budget, moment)
        for request in chosen:
            request.move(State.STEPPING)
        return StepBatch(tuple(request.key for request in chosen))

    def complete_step(self, batch: StepBatch, remaining: Mapping[str, Remaining]) -> Sequence[str]:
        """Record the step; a request of the batch that is not in `remaining` has failed.

        Returns the keys of those that took their last step; they and the failed ones are gone.
        """
        finished = []
        for key in batch.keys:
            request, left = self._requests[key], remaining.get(key)
            if left is None:
                request.move(State.FAILED)
            else:
                request.end_step(left.num_tokens, left.num_sequences, left.steps)
                request.solo_ms = self.budget.cost.step_ms(request.load)
            if request.state is State.FINISHED:
                finished.append(key)
            if request.state is not State.READY:
                del self._requests[key]
        return finished

    def out_of_memory(self, tokens: int) -> None:
        """A step of so many tokens met the end of memory: the next ones are smaller."""
        self.budget.shrink(tokens)

    @property
    def held_bytes(self) -> int:
        """Device memory that the requests keep between steps."""
        return sum(request.held_bytes for request in self._requests.values())

    def free_capacity(self) -> Capacity:
        """What may be claimed: nothing beside a solo request or where time or memory is taken.

        A request that waits for others does not close the door: who comes may be shorter.
        """
        held = self._requests.values()
        if any(request.solo for request in held):
            return Capacity(jobs=0, cost_ms=0.0, idle=False)
        cost_ms = self.max_cost_ms - sum(map(self._left_ms, held))
        largest = max((request.load for request in held), default=StepLoad())
        if not held:
            return Capacity(min(self.max_running, CLAIM_AT_ONCE), cost_ms, idle=True)
        room = self.max_running - len(held)
        if cost_ms <= 0 or not self.budget.has_room(largest, self.held_bytes):
            room = 0
        return Capacity(
            jobs=min(max(0, room), CLAIM_AT_ONCE), cost_ms=max(0.0, cost_ms), idle=False
        )

    def _left_ms(self, request: RunningRequest) -> float:
        """What is left of a request in the queue's own prices."""
        return request.cost_ms * request.steps_left / request.num_steps
