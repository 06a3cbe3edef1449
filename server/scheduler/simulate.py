"""A deterministic simulator: replays seeded traces of requests through the real `Scheduler`.

Time is a number that a cost model moves, so an hour of traffic takes seconds and gives the same
figures everywhere. A queue in front serves in order of arrival, as Redis does for one tenant.
`benchmarks/bench_scheduler.py` prints the comparison that the policy was chosen by.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.scheduler.budget import StepBudget, StepCost
from server.scheduler.policy import Moment, Policy
from server.scheduler.request import RunningRequest, StepLoad
from server.scheduler.scheduler import Remaining, Scheduler

PIXELS_PER_TOKEN = 16  # along each side: 8 of the VAE, 2 of the patch


@dataclass(frozen=True)
class Device:
    """What work costs on one device.

    Attributes:
        cost: of a step.
        decode_ms_per_pixel: of the VAE, which runs between steps.
        max_step_tokens: as the scheduler's.
    """

    cost: StepCost
    decode_ms_per_pixel: float
    max_step_tokens: int = 65536

    def solo_s(self, job: "TraceJob") -> float:
        """Seconds a job takes when it is alone."""
        guided = min(job.guided_steps, job.num_steps)
        steps_ms = guided * self.cost.step_ms(job.load(0))
        steps_ms += (job.num_steps - guided) * self.cost.step_ms(job.load(job.num_steps - 1))
        return (steps_ms + self.decode_ms(job)) / 1000

    def decode_ms(self, job: "TraceJob") -> float:
        """Milliseconds of a job's decoding."""
        return self.decode_ms_per_pixel * job.size * job.size


# The 2.6B model on one H200: matrix products and attention at 790 TFLOP/s, and what a packed
# forward saves (1.5x at 8 pictures of 256 px, 1.2x at 4 of 512, 1.06x at 2 of 1024) as a term in
# the root of its tokens. Within 7 % of the modelled times from 256 to 1536 px.
H200 = Device(
    StepCost(fixed_ms=0.0, root_ms=0.108, token_ms=5.69e-3, pair_ms=3.27e-7),
    decode_ms_per_pixel=2.85e-5,
)

# The demo checkpoint on one core of a Xeon, measured; its pictures are `DEMO_MIX`.
DEMO_CPU = Device(StepCost(), decode_ms_per_pixel=8.3e-3)


@dataclass(frozen=True)
class TraceJob:
    """One request of a trace: a square picture of `size` pixels a side.

    `guided_steps` of its `num_steps` run two branches, those that follow one: CFG truncation.
    """

    key: str
    arrives_s: float
    size: int
    num_steps: int = 50
    guided_steps: int = 12
    text_tokens: int = 100
    priority: str = "normal"
    deadline_s: float | None = None

    def branches(self, step: int) -> int:
        """Sequences of one step; none after the last."""
        return 0 if step >= self.num_steps else 1 + (step < self.guided_steps)

    def tokens(self, step: int) -> int:
        """Tokens of one step, over its branches."""
        return self.branches(step) * ((self.size // PIXELS_PER_TOKEN) ** 2 + self.text_tokens)

    def load(self, step: int) -> StepLoad:
        """Size of one step alone."""
        tokens = self.tokens(step)
        return StepLoad(tokens, tokens * tokens / max(1, self.branches(step)))


MIX = {256: 0.10, 512: 0.30, 768: 0.20, 1024: 0.35, 1536: 0.05}
DEMO_MIX = {64: 0.5, 96: 0.3, 128: 0.2}


def make_trace(
    *,
    seed: int,
    num_jobs: int,
    load: float,
    device: Device = H200,
    mix: dict[int, float] | None = None,
    num_steps: int = 50,
    guided_steps: int = 12,
) -> list[TraceJob]:
    """Poisson arrivals of a mixture of sizes.

    Args:
        seed: equal seeds give equal sizes and gaps.
        num_jobs: length of the trace.
        load: device time of the work that comes, each job alone, per unit of time.
        device: what a job costs.
        mix: pixels a side -> share.
        num_steps: of every job.
        guided_steps: steps with two branches, of every job.
    """
    mix = mix or MIX
    draw = random.Random(seed)
    sizes = draw.choices(list(mix), list(mix.values()), k=num_jobs)

    def job(index: int, arrives_s: float, size: int) -> TraceJob:
        return TraceJob(f"{index:06d}", arrives_s, size, num_steps, guided_steps)

    solo_s = {size: device.solo_s(job(0, 0.0, size)) for size in mix}
    mean_s = sum(share * solo_s[size] for size, share in mix.items()) / sum(mix.values())
    now, trace = 0.0, []
    for index, size in enumerate(sizes):
        now += draw.expovariate(load / mean_s)
        trace.append(job(index, now, size))
    return trace


@dataclass(frozen=True)
class Outcome:
    """What became of one job of the trace."""

    job: TraceJob
    finished_s: float
    solo_s: float

    @property
    def latency_s(self) -> float:
        """From its arrival to its picture."""
        return self.finished_s - self.job.arrives_s

    @property
    def stretch(self) -> float:
        """Latency in units of the job's time alone."""
        return self.latency_s / self.solo_s


@dataclass
class Replay:
    """One device that works through a trace; `run` may be called once.

    Attributes:
        trace: jobs by arrival.
        policy: chooses who steps.
        device: what steps cost.
        max_running: jobs the scheduler may hold.
        max_cost_ms: work the scheduler may hold.
    """

    trace: Sequence[TraceJob]
    policy: Policy
    device: Device = H200
    max_running: int = 32
    max_cost_ms: float = 60_000.0
    now: float = 0.0
    busy_s: float = 0.0
    step_of: dict[str, int] = field(default_factory=dict)

    def run(self) -> list[Outcome]:
        """Return the outcomes in the order of the trace."""
        jobs = {job.key: job for job in self.trace}
        budget = StepBudget(self.device.max_step_tokens, self.device.cost)
        scheduler = Scheduler(
            max_running=self.max_running,
            max_step_tokens=self.device.max_step_tokens,
            max_cost_ms=self.max_cost_ms,
            budget=budget,
            policy=self.policy,
            clock=lambda: self.now,
        )
        coming, queue = deque(self.trace), deque[TraceJob]()
        ended: dict[str, float] = {}
        while len(ended) < len(jobs):
            while coming and coming[0].arrives_s <= self.now:
                queue.append(coming.popleft())
            self._claim(scheduler, queue)
            batch = scheduler.schedule()
            if not batch.keys:
                self.now = coming[0].arrives_s
                continue
            load = StepLoad()
            for key in batch.keys:
                load = load.plus(jobs[key].load(self.step_of[key]))
                self.step_of[key] += 1
            self._spend(self.device.cost.step_ms(load))
            left = {key: self._remaining(jobs[key]) for key in batch.keys}
            for key in scheduler.complete_step(batch, left):
                self._spend(self.device.decode_ms(jobs[key]))
                ended[key] = self.now
        return [Outcome(job, ended[job.key], self.device.solo_s(job)) for job in self.trace]

    def _spend(self, ms: float) -> None:
        self.now += ms / 1000
        self.busy_s += ms / 1000

    def _claim(self, scheduler: Scheduler, queue: deque[TraceJob]) -> None:
        """Take what the scheduler has room for, in order, as the claim script does."""
        capacity = scheduler.free_capacity()
        cost_ms, taken = capacity.cost_ms, 0
        while queue and taken < capacity.jobs:
            job = queue[0]
            price_ms = 1000 * self.device.solo_s(job)
            if price_ms > cost_ms and not (capacity.idle and taken == 0):
                return
            queue.popleft()
            cost_ms, taken = cost_ms - price_ms, taken + 1
            self.step_of[job.key] = 0
            scheduler.add(self._running(job, price_ms))

    def _running(self, job: TraceJob, price_ms: float) -> RunningRequest:
        deadline_at = None if job.deadline_s is None else job.arrives_s + job.deadline_s
        return RunningRequest(
            key=job.key,
            num_tokens=job.tokens(0),
            num_sequences=job.branches(0),
            steps_left=job.num_steps,
            cost_ms=price_ms,
            priority=job.priority,
            submitted_at=job.arrives_s,
            deadline_at=deadline_at,
        )

    def _remaining(self, job: TraceJob) -> Remaining:
        step = self.step_of[job.key]
        return Remaining(job.tokens(step), job.num_steps - step, max(1, job.branches(step)))


class RunToCompletion:
    """First come, first served, one at a time: what most image servers do."""

    def choose(
        self, waiting: Sequence[RunningRequest], budget: StepBudget, moment: Moment, /
    ) -> list[RunningRequest]:
        """Return the oldest request."""
        return [min(waiting, key=lambda r: (r.submitted_at, r.key))] if waiting else []


class RoundRobin:
    """Everybody steps in turn, as many together as the token budget holds."""

    def __init__(self) -> None:
        self._turn: dict[str, int] = {}
        self._turns = 0

    def choose(
        self, waiting: Sequence[RunningRequest], budget: StepBudget, moment: Moment, /
    ) -> list[RunningRequest]:
        """Return those who have waited longest since their last step, as far as they fit."""
        self._turns += 1
        chosen: list[RunningRequest] = []
        load = StepLoad()
        for request in sorted(waiting, key=lambda r: (self._turn.get(r.key, 0), r.key)):
            both = load.plus(request.load)
            if not chosen or budget.fits(both, moment.held_bytes):
                chosen.append(request)
                load = both
                self._turn[request.key] = self._turns
        return chosen


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


@dataclass(frozen=True)
class Summary:
    """Latency figures of a set of outcomes."""

    p50_s: float
    p99_s: float
    stretch_p99: float

    @classmethod
    def of(
        cls, outcomes: Sequence[Outcome], wanted: Callable[[int], bool] = lambda _: True
    ) -> "Summary":
        """Summarise the jobs whose size is wanted."""
        some = [outcome for outcome in outcomes if wanted(outcome.job.size)]
        latencies = [outcome.latency_s for outcome in some]
        return cls(
            percentile(latencies, 0.5),
            percentile(latencies, 0.99),
            percentile([outcome.stretch for outcome in some], 0.99),
        )
