"""Exponential moving average of weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Ema:
    """Keeps ``average = decay * average + (1 - decay) * weight``, in fp32.

    Early on the decay is lowered to ``(1 + steps) / (10 + steps)``, so that the initial weights
    do not linger.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self._steps = 0
        self.average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        state = self._module.state_dict()
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [v.float() for v in state.values()], 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """What :meth:`load_state_dict` restores."""
        return {"steps": self._steps, "average": self.average}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a saved state."""
        steps, average = state["steps"], state["average"]
        assert isinstance(steps, int)
        assert isinstance(average, dict)
        self._steps = steps
        for key, value in average.items():
            self.average[key].copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights in the module's own dtypes."""
        return {k: self.average[k].to(v.dtype) for k, v in self._module.state_dict().items()}
