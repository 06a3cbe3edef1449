"""What the training loop needs to know of a stage."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from trainer.config import OptimizerConfig
from trainer.distributed import World, broadcast_parameters

LossAndReport = tuple[Tensor, Mapping[str, float]]


class Stage(ABC):
    """One module, one loss, a number of steps.

    Everything random is drawn from the step's number, so that a resumed run sees exactly what an
    uninterrupted one sees.

    Attributes:
        name: of the stage's folder.
        total_steps: to train.
        images_per_step: over all processes, for the rate shown.
        optimizer: how weights are updated.
        module: what is trained.
        sharded: whether the module averages its gradients itself.
        on_nonfinite: what a loss or gradient that is no number does.
    """

    name: str
    total_steps: int
    images_per_step: int
    optimizer: OptimizerConfig
    module: nn.Module
    sharded: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @abstractmethod
    def losses(self, step: int) -> Iterator[LossAndReport]:
        """The parts of a step's loss, one after another, and what to report of it.

        Gradients are taken of each part before the next is made, and add up.
        """

    def spread(self, world: World) -> None:
        """Put the module where it is trained; processes start from the main one's weights."""
        self.module.to(world.device)
        broadcast_parameters(world, self.module.parameters())

    def suspects(self) -> list[str]:
        """Names of this process's examples of the last step whose loss is no number."""
        return []


class WholeStage(Stage):
    """A stage whose step is one forward."""

    @abstractmethod
    def loss(self, step: int) -> LossAndReport:
        """Loss of a step and what to report of it."""

    def losses(self, step: int) -> Iterator[LossAndReport]:
        """The one part."""
        yield self.loss(step)
