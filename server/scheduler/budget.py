"""What a step costs and what it may carry: device time and memory by the tokens of a batch.

The parameters are measured on the device at start-up (`server/worker/warmup.py`); here they are
plain numbers, so that the simulator can use those of another device.
"""

from dataclasses import dataclass
from math import sqrt

from server.scheduler.request import StepLoad


@dataclass(frozen=True, slots=True)
class StepCost:
    """Device time of a packed forward: fixed + root * sqrt(tokens) + token * tokens + pair * pairs.

    The first two terms are what packing saves: launches, and the low use of a device by a small
    forward. The defaults are those of the demo checkpoint on one core of a CPU.
    """

    fixed_ms: float = 15.0
    root_ms: float = 0.0
    token_ms: float = 0.2
    pair_ms: float = 0.0

    def step_ms(self, load: StepLoad) -> float:
        """Estimated milliseconds of one forward; 0 for an empty one."""
        if not load.tokens:
            return 0.0
        return (
            self.fixed_ms
            + self.root_ms * sqrt(load.tokens)
            + self.token_ms * load.tokens
            + self.pair_ms * load.pairs
        )


@dataclass(frozen=True, slots=True)
class MemoryCost:
    """Device memory of a packed forward, and the limit for it together with what requests hold.

    Decoding happens between steps, so it and a step never need memory at the same time. A limit of
    0 means that memory is not the device's concern.
    """

    fixed_bytes: float = 0.0
    token_bytes: float = 0.0
    decode_bytes: float = 0.0
    limit_bytes: float = 0.0

    def step_bytes(self, load: StepLoad) -> float:
        """Estimated peak of one forward, or of decoding if that needs more."""
        return max(self.decode_bytes, self.fixed_bytes + self.token_bytes * load.tokens)


class StepBudget:
    """What one step may carry.

    Args:
        max_tokens: tokens of one packed forward; a larger request steps alone.
        cost: device time of a forward.
        memory: device memory of a forward.
    """

    def __init__(
        self,
        max_tokens: int,
        cost: StepCost | None = None,
        memory: MemoryCost | None = None,
    ) -> None:
        self.max_tokens = max_tokens
        self.cost = cost or StepCost()
        self.memory = memory or MemoryCost()

    def fits(self, load: StepLoad, held_bytes: float) -> bool:
        """Whether a step of several requests fits, beside what all requests hold."""
        return load.tokens <= self.max_tokens and self._fits_memory(load, held_bytes)

    def has_room(self, load: StepLoad, held_bytes: float) -> bool:
        """Whether memory allows to hold more requests while steps as large as `load` are taken."""
        return self._fits_memory(load, held_bytes)

    def shrink(self, tokens: int) -> None:
        """A forward of so many tokens met the end of memory: batch no more than half from now."""
        self.max_tokens = max(1, min(self.max_tokens, tokens // 2))

    def _fits_memory(self, load: StepLoad, held_bytes: float) -> bool:
        limit = self.memory.limit_bytes
        return not limit or held_bytes + self.memory.step_bytes(load) <= limit
