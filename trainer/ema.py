"""Exponential moving average of weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Keeps ``average = decay * average + (1 - decay) * weight``, in fp32.

    Early on the decay is lowered to ``(1 + steps) / (10 + steps)``, so that the initial weights
    do not linger. Of sharded weights each process averages its shard.

    Attributes:
        steps: updates so far.
        average: by the names of the module's state.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module = module
        self._decay = decay
        self.steps = 0
        self.average = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's present weights."""
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        weights = [_local(v).float() for v in self._module.state_dict().values()]
        torch._foreach_lerp_([_local(v) for v in self.average.values()], weights, 1 - decay)

    def state_dict(self) -> dict[str, object]:
        """What :meth:`load_state_dict` restores."""
        return {"steps": self.steps, "average": self.average}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a saved state."""
        steps, average = state["steps"], state["average"]
        assert isinstance(steps, int)
        assert isinstance(average, dict)
        self.steps = steps
        for key, value in average.items():
            self.average[key].copy_(value)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights in the module's own dtypes, sharded as it is."""
        return {k: self.average[k].to(v.dtype) for k, v in self._module.state_dict().items()}

    def whole_weights(self) -> dict[str, Tensor]:
        """The averaged weights on the CPU, unsharded; all processes call it together."""
        return {k: _whole(v).to("cpu") for k, v in self.weights().items()}


def _local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
