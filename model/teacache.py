"""TeaCache: steps that do without the joint blocks, decided for every branch by itself.

A branch whose joint input has hardly changed gets the *residual* of its last computed step (joint
output minus joint input) in place of the blocks. Embedding, refiners and final layer always run.
What a branch remembers lives in its `TeaCacheState`, under the ids of its request, image and
guidance branch, with the step counted by the request: so neither truncated guidance nor equal
lengths confuse it, and nobody's decision depends on the company.

Two policies decide (after Liu et al., arXiv 2411.19108):

- `SkipPlan`: known beforehand, from a calibrated schedule or from an earlier run's decisions;
- `Threshold`: skip while the accumulated estimate of the change stays below a number. The estimate
  is a polynomial of the relative L1 change of the modulated input of joint block 0, clamped at 0.

Shapes: T = tokens of a branch, d = width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from model.cache_config import CacheConfig
from model.next_dit import NextDiT
from model.packing import PackedSequences
from model.request import ResolvedRequest
from model.samplers import Sampler

BranchId = tuple[int, str]  # image of the request, "cond" or "uncond"


@dataclass(frozen=True, slots=True)
class TeaCacheState:
    """What one branch remembers from step to step; a step makes a new one.

    Attributes:
        decisions: a letter for every step so far: 1 ran the joint blocks, 0 did without.
        accumulated: estimated change since the last computed step.
        compared: for every step so far what was held against the threshold; None where nothing
            was.
        signal: modulated input [T, d] of the step before; only where a threshold decides.
        residual: [T, d] of the last computed step; only where a later step may need it.
    """

    decisions: str = ""
    accumulated: float = 0.0
    compared: tuple[float | None, ...] = ()
    signal: Tensor | None = None
    residual: Tensor | None = None

    @property
    def computed(self) -> bool:
        """Whether its newest step ran the joint blocks."""
        return self.decisions.endswith("1")


@dataclass(frozen=True, slots=True)
class SkipPlan:
    """Decisions known beforehand, one for each step of the request."""

    computed: tuple[bool, ...]

    def needs_signal(self, step: int) -> bool:
        """Whether the step's decision looks at the signal; never."""
        return False

    def keeps_residual(self, step: int) -> bool:
        """Whether the step after this one is skipped."""
        return step + 1 < len(self.computed) and not self.computed[step + 1]

    def decide(self, state: TeaCacheState, step: int, change: float | None) -> TeaCacheState:
        """The state with this step's decision added."""
        assert change is None
        return _decided(state, self.computed[step], 0.0, None)


@dataclass(frozen=True, slots=True)
class Threshold:
    """TeaCache's own rule; the first and the last step always compute.

    Attributes:
        rel_l1_thresh: skip while the accumulated estimate is below it.
        coefficients: of the polynomial, highest power first.
        num_steps: of the request.
    """

    rel_l1_thresh: float
    coefficients: tuple[float, ...]
    num_steps: int

    def needs_signal(self, step: int) -> bool:
        """Whether this or the next step's decision looks at the signal."""
        return step < self.num_steps - 2 or 0 < step < self.num_steps - 1

    def keeps_residual(self, step: int) -> bool:
        """Whether a later step may be skipped."""
        return step < self.num_steps - 2

    def decide(self, state: TeaCacheState, step: int, change: float | None) -> TeaCacheState:
        """The state with this step's decision added.

        Args:
            state: of the branch.
            step: of the request, from 0.
            change: relative L1 change of the signal since the step before.
        """
        if change is None or step in (0, self.num_steps - 1) or state.residual is None:
            return _decided(state, True, 0.0, None)
        accumulated = state.accumulated + estimated_change(self.coefficients, change)
        computed = not accumulated < self.rel_l1_thresh  # a change that is no number computes
        return _decided(state, computed, 0.0 if computed else accumulated, accumulated)


class Policy(Protocol):
    """How a branch decides; see `SkipPlan` and `Threshold`."""

    def needs_signal(self, step: int, /) -> bool:
        """Whether this or the next step's decision looks at the signal."""

    def keeps_residual(self, step: int, /) -> bool:
        """Whether the residual as of this step may be needed."""

    def decide(self, state: TeaCacheState, step: int, change: float | None, /) -> TeaCacheState:
        """The state with this step's decision added."""


def estimated_change(coefficients: Sequence[float], change: float) -> float:
    """The polynomial at `change`, at least 0: fits go below it where they have no data."""
    value = 0.0
    for coefficient in coefficients:
        value = value * change + coefficient
    return 0.0 if value < 0.0 else value


def _decided(
    state: TeaCacheState, computed: bool, accumulated: float, compared: float | None
) -> TeaCacheState:
    return replace(
        state,
        decisions=state.decisions + "01"[computed],
        accumulated=accumulated,
        compared=(*state.compared, compared),
    )


@dataclass
class RequestCache:
    """The cache of one request: how each of its branches decides, and what each remembers.

    Attributes:
        default: policy of branches that have none of their own.
        own: policy by branch; an earlier run's decisions, if they are to be repeated.
        states: by branch.
    """

    default: Policy
    own: Mapping[BranchId, Policy] = field(default_factory=dict)
    states: dict[BranchId, TeaCacheState] = field(default_factory=dict)

    def turn(self, branch: BranchId, step: int) -> BranchTurn:
        """What `run_blocks` needs of a branch for one step."""
        policy = self.own.get(branch, self.default)
        return BranchTurn(policy, self.states.get(branch, TeaCacheState()), step)

    def keep(self, states: Mapping[BranchId, TeaCacheState]) -> None:
        """Take the states a step made; branches that have ended let their tensors go."""
        for branch, state in self.states.items():
            if branch not in states:
                self.states[branch] = replace(state, signal=None, residual=None)
        self.states.update(states)

    @property
    def decisions(self) -> dict[str, str]:
        """What was decided, by branch as "image/cond" or "image/uncond": see `TeaCacheState`."""
        return {f"{image}/{kind}": s.decisions for (image, kind), s in self.states.items()}


@dataclass(frozen=True, slots=True)
class BranchTurn:
    """A branch with a cache before one step."""

    policy: Policy
    state: TeaCacheState
    step: int


def run_blocks(
    dit: NextDiT, packed: PackedSequences, turns: Sequence[BranchTurn | None]
) -> tuple[PackedSequences, list[TeaCacheState | None]]:
    """Run the joint blocks for the branches that compute, and residuals for the others.

    The host waits for the device once if any branch has a threshold, otherwise never.

    Args:
        dit: the network.
        packed: what `dit.embed` made.
        turns: for each sample, in the caller's order of `dit.embed`, its cache; None: none.

    Returns:
        What `dit.head` takes, and the new state of every branch with a cache.
    """
    by_place = [turns[index] for index in packed.order]
    if not any(by_place):
        return dit.blocks(packed), [None] * len(turns)
    before = packed.hidden.split(packed.layout.lengths)
    decided = _decide(dit, packed, by_place)
    places = [place for place, state in enumerate(decided) if _computes(state)]
    after = list(before)
    for place, output in zip(places, _outputs(dit, packed, places), strict=True):
        after[place] = output
    states: list[TeaCacheState | None] = [None] * len(turns)
    for place, (turn, state) in enumerate(zip(by_place, decided, strict=True)):
        if turn is None or state is None:
            continue
        residual = turn.state.residual
        if _computes(state):
            residual = (
                after[place] - before[place] if turn.policy.keeps_residual(turn.step) else None
            )
        else:
            assert residual is not None
            after[place] = before[place] + residual
            residual = residual if turn.policy.keeps_residual(turn.step) else None
        states[packed.order[place]] = replace(state, residual=residual)
    return replace(packed, hidden=torch.cat(after)), states


def _computes(state: TeaCacheState | None) -> bool:
    return state is None or state.computed


def _outputs(dit: NextDiT, packed: PackedSequences, places: Sequence[int]) -> Sequence[Tensor]:
    """Joint outputs [T, d] of the sequences at these places."""
    if not places:
        return []
    some = packed
    if len(places) < len(packed.order):
        some = packed.select(places, dit.attention.plan)
    outputs: Sequence[Tensor] = dit.blocks(some).hidden.split(some.layout.lengths)
    return outputs


def _decide(
    dit: NextDiT, packed: PackedSequences, turns: Sequence[BranchTurn | None]
) -> list[TeaCacheState | None]:
    """Every branch's state with this step's decision and signal; None where it has no cache."""
    watched = [p for p, turn in enumerate(turns) if turn and turn.policy.needs_signal(turn.step)]
    signals = dict(zip(watched, dit.joint_signals(packed, watched), strict=True))
    earlier = {
        place: turn.state.signal
        for place, turn in enumerate(turns)
        if turn is not None and turn.state.signal is not None
    }
    compared = [place for place in watched if place in earlier]
    changes: dict[int, float] = {}
    if compared:
        ratios = [relative_change(signals[place], earlier[place]) for place in compared]
        changes = dict(zip(compared, torch.stack(ratios).tolist(), strict=True))  # the one copy
    return [
        None
        if turn is None
        else replace(
            turn.policy.decide(turn.state, turn.step, changes.get(place)),
            signal=signals.get(place),
        )
        for place, turn in enumerate(turns)
    ]


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """``mean|now - before| / mean|before|`` of two signals [T, d], a float32 scalar tensor."""
    before = before.float()
    return (now.float() - before).abs().mean() / before.abs().mean()


def plan_cache(
    request: ResolvedRequest,
    sampler: Sampler,
    config: CacheConfig | None,
    replay: Mapping[str, str] | None = None,
) -> tuple[RequestCache | None, list[str]]:
    """The cache a request asks for, and sentences for the user where it gets none.

    Args:
        request: with nothing left to decide.
        sampler: its solver.
        config: the checkpoint's `teacache.json`, where it has one.
        replay: decisions of an earlier run, as `RequestCache.decisions` gives them; they count in
            place of the request's threshold.

    Raises:
        ValueError: one sentence, when `replay` does not fit the request's steps.
    """
    if request.cache == "off":
        return None, []
    if replay:
        own: dict[BranchId, Policy] = {
            _branch_of(name): SkipPlan(_replayed(name, letters, sampler.num_evaluations))
            for name, letters in replay.items()
        }
        return RequestCache(SkipPlan((True,) * sampler.num_evaluations), own), []
    if config is not None and isinstance(request.cache, str):
        plan = config.plan(request.cache, request.sampler, sampler, request.shift)
        if plan is not None:
            return RequestCache(SkipPlan(plan)), []
    elif config is not None and config.coefficients is not None:
        assert not isinstance(request.cache, str)
        threshold = Threshold(request.cache, config.coefficients, sampler.num_evaluations)
        return RequestCache(threshold), []
    shown = request.cache if isinstance(request.cache, str) else f"{request.cache:g}"
    return None, [f"cache {shown} has no effect: this checkpoint is not calibrated for it"]


def _branch_of(name: str) -> BranchId:
    image, _, kind = name.partition("/")
    if not image.isdecimal() or kind not in ("cond", "uncond"):
        raise ValueError(f"decisions of {name!r} are not allowed: give '0/cond', '0/uncond', …")
    return int(image), kind


def _replayed(name: str, letters: str, num_steps: int) -> tuple[bool, ...]:
    """Decisions of one branch; a guided branch that ended early computes what is left."""
    if not set(letters) <= {"0", "1"} or not letters.startswith("1") or len(letters) > num_steps:
        raise ValueError(
            f"decisions of {name!r} are not allowed: give up to {num_steps} letters 1 or 0, the "
            "first 1"
        )
    return tuple(letter == "1" for letter in letters.ljust(num_steps, "1"))
