"""RunningRequest: what the scheduler knows of a job on the device. No tensors, no torch."""

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """Where a running request is: between steps, in one, or past its last."""

    WAITING = "waiting"
    STEPPING = "stepping"
    FINISHED = "finished"


@dataclass
class RunningRequest:
    """A job between its preparation and its last denoising step.

    Attributes:
        key: names the claim (`Claim.key`).
        num_tokens: tokens its next step adds to the packed forward, over all branches.
        steps_left: denoising steps to go.
        cost_ms: estimated device time of the whole job.
        solo: it must run alone.
        phase: see `Phase`.
    """

    key: str
    num_tokens: int
    steps_left: int
    cost_ms: float = 0.0
    solo: bool = False
    phase: Phase = Phase.WAITING

    def begin_step(self) -> None:
        """Enter a step."""
        assert self.phase is Phase.WAITING, (self.key, self.phase)
        self.phase = Phase.STEPPING

    def end_step(self, num_tokens: int, steps_left: int) -> None:
        """Leave the step with what is left to do now."""
        assert self.phase is Phase.STEPPING, (self.key, self.phase)
        self.num_tokens, self.steps_left = num_tokens, steps_left
        self.phase = Phase.FINISHED if steps_left == 0 else Phase.WAITING
