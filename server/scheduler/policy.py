"""Who steps together: the request that is due first, and those that pay for a place beside it.

Every request is given a time by which it is due: soon after it came for a short one, much later for
a long one. So short work overtakes long work until the long has waited out its patience; among long
work the order is nearly that of arrival, which is what bounds the worst case. Others join the step
of the most urgent while that brings more than it delays: small requests share what a forward costs
however small it is, large ones have nothing to share and wait their turn. Why these rules and these
numbers: docs/adr/0010-who-steps-together.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Protocol

from server.scheduler.budget import StepBudget
from server.scheduler.request import RunningRequest

# In units of the longest patience: `high` passes all normal work of its time, `low` lets it pass.
PRIORITY_OFFSETS = {"low": 1.0, "normal": 0.0, "high": -1.0}


@dataclass(frozen=True)
class Moment:
    """What a policy may look at besides the requests.

    Attributes:
        now: seconds of the scheduler's clock.
        typical_ms: device time of a typical job, above 0: the scale on which work is long.
        held_bytes: device memory held by all requests.
    """

    now: float
    typical_ms: float
    held_bytes: float = 0.0


class Policy(Protocol):
    """Chooses the requests of a step."""

    def choose(
        self, waiting: Sequence[RunningRequest], budget: StepBudget, moment: Moment, /
    ) -> list[RunningRequest]:
        """Return the requests of the next step, at least one if any waits."""


@dataclass(frozen=True)
class EarliestDue:
    """Earliest due first, with packing. Times are in typical jobs, so one setting fits any device.

    Attributes:
        patience: how long the longest work lets shorter work pass.
        knee: work of this length has half of that patience.
        steepness: how sharply patience falls below the knee.
        horizon: the value of a place in the step falls by e when the work is due so much later.
        join_gain: others join when they bring at least this times the value per millisecond.
        max_stretch: joining makes a step at most so many times as long as its leader's own, times
            what the members gain by sharing.
    """

    patience: float = 60.0
    knee: float = 0.45
    steepness: float = 4.0
    horizon: float = 20.0
    join_gain: float = 1.01
    max_stretch: float = 2.5

    def due(self, request: RunningRequest, moment: Moment) -> float:
        """When a request is due, in seconds of the clock; it goes on after that too.

        A caller's own deadline that can still be met counts too: for the latest start.
        """
        length: float = (request.total_ms / moment.typical_ms / self.knee) ** self.steepness
        share = length / (1 + length) + PRIORITY_OFFSETS[request.priority]
        due = request.submitted_at + self.patience * moment.typical_ms / 1000 * share
        if request.deadline_at is not None:
            latest_start = request.deadline_at - request.left_ms / 1000
            if latest_start >= moment.now:
                due = min(due, latest_start)
        return due

    def choose(
        self, waiting: Sequence[RunningRequest], budget: StepBudget, moment: Moment, /
    ) -> list[RunningRequest]:
        """Return the request that is due first and those that pay for their place beside it."""
        ranked = sorted((self.due(request, moment), request.key, request) for request in waiting)
        if not ranked:
            return []
        first_due, _, leader = ranked[0]
        chosen, load = [leader], leader.load
        load_ms = alone_ms = value = leader.solo_ms
        for due, _, request in ranked[1:]:
            own_ms = request.solo_ms
            both = load.plus(request.load)
            both_ms = budget.cost.step_ms(both)
            worth = own_ms * self._discount(due - first_due, moment)
            pays = worth * load_ms >= self.join_gain * value * (both_ms - load_ms)
            limit_ms = self.max_stretch * leader.solo_ms * (alone_ms + own_ms) / both_ms
            if pays and both_ms <= limit_ms and budget.fits(both, moment.held_bytes):
                chosen.append(request)
                load, load_ms, alone_ms, value = both, both_ms, alone_ms + own_ms, value + worth
        return chosen

    def _discount(self, later_s: float, moment: Moment) -> float:
        """Worth of work that is due `later_s` after the most urgent."""
        return exp(-1000 * later_s / (self.horizon * moment.typical_ms))
