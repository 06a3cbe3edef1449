"""A stage of flow matching on an encoded data set: the paper's recipe at any number of processes.

What a step sees depends on the seed and the step alone, never on how many processes share it: every
example has random numbers of its own, and the loss is the mean over the step's pictures.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.next_dit import NextDiT
from trainer.config import FlowStageConfig
from trainer.data.packing import plan_packs
from trainer.data.records import CaptionChoice
from trainer.distributed import World, sum_over_processes
from trainer.objective import POOL, Noised, pooled, velocity_errors
from trainer.parallel import recompute_blocks, shard
from trainer.precision import fast_dtype, mixed_precision
from trainer.stages.base import LossAndReport, Stage

if TYPE_CHECKING:
    from trainer.data.encoded import EncodedSet  # brings diffusers, which a step does not need

ORDER_STREAM, CAPTION_STREAM, NOISE_STREAM, AUXILIARY_STREAM = range(4)
TENTHS = 10


class FlowStage(Stage):
    """Trains a Next-DiT on packed ragged micro-batches within a token budget.

    Args:
        config: of the stage.
        dit: to train; the same on every process.
        data: encoded at the stage's resolution.
        seed: of the run and the stage.
        world: the processes taking part.
    """

    module: NextDiT

    def __init__(
        self,
        config: FlowStageConfig,
        dit: NextDiT,
        data: "EncodedSet",
        seed: tuple[int, int],
        world: World,
    ) -> None:
        self.name, self.total_steps = config.name, config.steps
        self.images_per_step = config.batch_images
        self.optimizer, self.on_nonfinite = config.optimizer, config.on_nonfinite
        self.module = dit
        self.sharded = config.sharded and world.size > 1
        self._config, self._data, self._seed, self._world = config, data, seed, world
        self._choice = CaptionChoice(config)
        self._permutation = lru_cache(2)(self._shuffled)
        self._suspects: list[str] = []

    def spread(self, world: World) -> None:
        """Recompute the blocks, and shard the weights if there is someone to share them with."""
        if self._config.recompute:
            recompute_blocks(self.module)
        if self.sharded:
            shard(self.module, world, self._dtype, reshard=self._config.reshard)
        else:
            super().spread(world)

    def losses(self, step: int) -> Iterator[LossAndReport]:
        """One part for each packed forward; the last one reports on the whole step."""
        items, captions = self.examples(step)
        mine = plan_packs(
            [self._cost(i, c) for i, c in zip(items, captions, strict=True)],
            self._config.micro_tokens,
            self._world.size,
        )[self._world.rank]
        tally = _Tally(self._world)
        self._suspects = []
        for number, places in enumerate(mine, start=1):
            errors, auxiliary, timesteps = self._forward(step, places, items, captions)
            total = errors.sum()
            if auxiliary is not None:
                total = total + self._config.auxiliary_weight * auxiliary.sum()
            tally.add(errors, timesteps, auxiliary)
            self._note_suspects(errors, auxiliary, [items[place] for place in places])
            # Processes average their gradients; the step's loss is the mean over all its pictures.
            loss = total * (self._world.size / len(items))
            yield loss, tally.report() if number == len(mine) else {}

    def suspects(self) -> list[str]:
        """See the base class."""
        return self._suspects

    def examples(self, step: int) -> tuple[list[int], list[int | None]]:
        """Items of a step and the caption drawn for each; the same on every process."""
        num, size = len(self._data), self._config.batch_images
        items, captions = [], []
        for place in range(size):
            epoch, turn = divmod(step * size + place, num)
            item = int(self._permutation(epoch)[turn])
            rng = np.random.default_rng((*self._seed, step, place, CAPTION_STREAM))
            items.append(item)
            captions.append(self._choice.draw(self._data.record(item), rng))
        return items, captions

    @property
    def _dtype(self) -> torch.dtype:
        fast = fast_dtype(torch.device(self._world.device).type)
        return fast if self._config.precision == "bf16" else torch.float32

    def _cost(self, item: int, caption: int | None) -> int:
        """Tokens of an example in the packed forward, its pooled version included."""
        tokens = self._data.tokens(item, caption)
        if self._config.auxiliary_weight:
            image = self._data.image_tokens(item)
            tokens += tokens - image + image // POOL**2
        return tokens

    def _forward(
        self, step: int, places: list[int], items: list[int], captions: list[int | None]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Errors ``[n]`` of the examples at ``places``, of their pooled versions, and timesteps."""
        clean = [self._data.latents(items[place]) for place in places]
        prompts = [self._data.features(items[place], captions[place]) for place in places]
        noised = self._noised(clean, step, places, NOISE_STREAM)
        auxiliary = None
        if self._config.auxiliary_weight:
            auxiliary = self._noised(pooled(clean), step, places, AUXILIARY_STREAM)
        whole = self.sharded or self._dtype == torch.float32
        device_type = torch.device(self._world.device).type
        with nullcontext() if whole else mixed_precision(device_type):
            errors, extra = velocity_errors(self.module, noised, prompts, auxiliary)
        return errors, extra, noised.timesteps

    def _noised(self, clean: list[Tensor], step: int, places: list[int], stream: int) -> Noised:
        generators = [_generator(*self._seed, step, place, stream) for place in places]
        return Noised.draw(clean, self._config.timestep_shift, generators)

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((*self._seed, epoch, ORDER_STREAM))
        return rng.permutation(len(self._data))

    def _note_suspects(self, errors: Tensor, auxiliary: Tensor | None, items: list[int]) -> None:
        both = errors if auxiliary is None else errors + auxiliary
        for item, error in zip(items, both.detach().tolist(), strict=True):
            if not math.isfinite(error):
                self._suspects.append(self._data.record(item).name)


class _Tally:
    """Sums of a step's errors: all, pooled, and by tenths of the timestep."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros(2, TENTHS + 2, dtype=torch.float64)  # errors, counts

    def add(self, errors: Tensor, timesteps: Tensor, auxiliary: Tensor | None) -> None:
        """Take in the errors ``[n]`` of one forward."""
        tenths = (timesteps * TENTHS).long().clamp_max(TENTHS - 1)
        found = errors.detach().to("cpu", torch.float64)
        self._sums[0].index_add_(0, tenths, found)
        self._sums[1].index_add_(0, tenths, torch.ones_like(found))
        self._sums[:, TENTHS] += torch.tensor([found.sum(), len(found)])
        if auxiliary is not None:
            pooled_errors = auxiliary.detach().to("cpu", torch.float64)
            self._sums[:, TENTHS + 1] += torch.tensor([pooled_errors.sum(), len(pooled_errors)])

    def report(self) -> dict[str, float]:
        """Means over all processes; a tenth where no sample fell is absent."""
        sum_over_processes(self._world, self._sums)
        names = [*(f"loss_t{tenth}" for tenth in range(TENTHS)), "loss_velocity", "loss_auxiliary"]
        columns = zip(names, *self._sums.tolist(), strict=True)
        report = {name: total / count for name, total, count in columns if count}
        return dict(sorted(report.items(), key=lambda item: item[0].startswith("loss_t")))


def _generator(*words: int) -> torch.Generator:
    """A CPU generator that depends on all of the words."""
    number = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(number)
