"""RunningRequest: what the scheduler knows of a job on the device. No tensors, no torch."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class StepLoad(NamedTuple):
    """Size of a packed forward: its tokens, and pairs of tokens that attend to each other."""

    tokens: float = 0.0
    pairs: float = 0.0

    def plus(self, other: "StepLoad") -> "StepLoad":
        """Both in one forward."""
        return StepLoad(self.tokens + other.tokens, self.pairs + other.pairs)


class State(Enum):
    """Where a running request is; the last three are final."""

    READY = "ready"  # between steps; may be left out of the next one
    STEPPING = "stepping"
    FINISHED = "finished"  # took its last step
    FAILED = "failed"  # its step raised
    ABORTED = "aborted"  # canceled, expired, or its lease is lost


MOVES: dict[State, frozenset[State]] = {
    State.READY: frozenset({State.STEPPING, State.ABORTED}),
    State.STEPPING: frozenset({State.READY, State.FINISHED, State.FAILED}),
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.ABORTED: frozenset(),
}


@dataclass
class RunningRequest:
    """A job between its preparation and its last denoising step.

    Times are seconds of the scheduler's clock.

    Attributes:
        key: names the claim (`Claim.key`).
        num_tokens: tokens its next step adds to the packed forward, over all branches.
        steps_left: denoising steps to go.
        num_sequences: sequences of its next step, about equally long.
        cost_ms: estimated device time of the whole job, as the queue prices it.
        solo: it must run alone.
        priority: class of `policy.PRIORITY_WEIGHTS`.
        submitted_at: when its caller asked.
        deadline_at: when it is worth nothing any more; None for never.
        held_bytes: device memory it keeps between steps.
        num_steps: denoising steps it came with.
        load: size of its next step.
        solo_ms: estimated device time of its next step alone; the scheduler's, like the next.
        total_ms: estimated device time of all its steps alone.
        state: see `State`.
    """

    key: str
    num_tokens: int
    steps_left: int
    num_sequences: int = 1
    cost_ms: float = 0.0
    solo: bool = False
    priority: str = "normal"
    submitted_at: float = 0.0
    deadline_at: float | None = None
    held_bytes: int = 0
    num_steps: int = field(init=False)
    load: StepLoad = field(init=False)
    solo_ms: float = 0.0
    total_ms: float = 0.0
    state: State = State.READY

    def __post_init__(self) -> None:
        self.num_steps = self.steps_left
        self._measure()

    @property
    def left_ms(self) -> float:
        """Estimated device time of the steps it still needs."""
        return self.total_ms * self.steps_left / self.num_steps

    def move(self, state: State) -> None:
        """Change the state, along `MOVES` only."""
        assert state in MOVES[self.state], (self.key, self.state, state)
        self.state = state

    def end_step(self, num_tokens: int, num_sequences: int, steps_left: int) -> None:
        """Leave a step with what is left to do now."""
        self.num_tokens, self.num_sequences = num_tokens, num_sequences
        self.steps_left = steps_left
        self._measure()
        self.move(State.READY if steps_left else State.FINISHED)

    def _measure(self) -> None:
        tokens = self.num_tokens
        self.load = StepLoad(tokens, tokens * tokens / max(1, self.num_sequences))
