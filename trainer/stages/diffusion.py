"""A diffusion stage: flow matching of the Next-DiT on cached latents and frozen text features."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import flow
from model.config import NextDiTConfig
from model.next_dit import NextDiT
from model.vae import VAE
from trainer.config import Recipe
from trainer.data.captions import CaptionEncoder, CaptionSampler
from trainer.data.latents import LatentPool
from trainer.distributed import World
from trainer.loss import sample_timesteps, velocity_loss
from trainer.precision import mixed_precision
from trainer.stages.base import WholeStage

STEPS_SORTED = 4
SCENES_APART = 10_000_000  # more than any stage draws
# Last words of the seeds, so that no two streams of random numbers are the same.
SIZES_STREAM, SCENES_STREAM, NOISE_STREAM = range(3)


class DiffusionStage(WholeStage):
    """Trains the transformer on packed ragged batches through the same forward as serving."""

    module: NextDiT

    def __init__(
        self,
        recipe: Recipe,
        index: int,
        vae: VAE,
        captions: CaptionEncoder,
        cache: Path,
        world: World,
    ) -> None:
        self._config = recipe.diffusion[index]
        self.name = self._config.name
        self.optimizer = self._config.optimizer
        self.total_steps = self._config.steps
        self._seed, self._world, self._captions = (recipe.seed, index), world, captions
        torch.manual_seed(recipe.seed)
        self.config = transformer_config(recipe, vae.latent_channels, captions.feature_dim)
        self.module = NextDiT(self.config)
        self._write = CaptionSampler(
            self._config.levels, self._config.templates, self._config.caption_dropout
        )
        weights = np.array([size.weight for size in self._config.sizes])
        self._shares = weights / weights.sum()
        self._group = -1
        self._dealt: tuple[Tensor, list[str]] = torch.empty(0), []
        self._pools = []
        for place, (size, share) in enumerate(zip(self._config.sizes, self._shares, strict=True)):
            num = max(1, int(self._config.scenes * share) // world.size)
            # Every size and rank has scenes of its own; stages of like sizes share their cache.
            first = (place * world.size + world.rank) * SCENES_APART
            self._pools.append(LatentPool(cache, vae, size, num, recipe.seed, first))
        self.images_per_step = world.size * self._batch_size(int(np.argmax(weights)))

    def _batch_size(self, place: int) -> int:
        size = self._config.sizes[place]
        tokens = (size.width // 16) * (size.height // 16)
        return max(1, self._config.batch_tokens // tokens)

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Velocity error averaged over samples, and by thirds of the timestep."""
        clean, texts = self._examples(step)
        prompts = self._captions.encode(texts)
        rng = np.random.default_rng((*self._seed, step, self._world.rank, NOISE_STREAM))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = sample_timesteps(len(clean), self._config.timestep_shift, generator)
        noisy = flow.interpolate(clean, noise, timesteps)
        device = self._world.device
        with mixed_precision(torch.device(device).type):
            velocity = self.module(list(noisy), timesteps, prompts)
        target = flow.velocity_target(clean, noise).to(device)
        losses = velocity_loss(velocity, list(target))
        return losses.mean(), _by_timestep(losses.detach().cpu(), timesteps)

    def _examples(self, step: int) -> tuple[Tensor, list[str]]:
        """Latents and prompts of a step.

        The examples of STEPS_SORTED steps are drawn together and dealt out by prompt length, so
        that a packed batch holds few different lengths and its sequences form long runs.
        """
        group, turn = divmod(step, STEPS_SORTED)
        # All ranks take the same size and length class, so that none waits for another.
        shared = np.random.default_rng((*self._seed, group, SIZES_STREAM))
        place = int(shared.choice(len(self._pools), p=self._shares))
        turn = int(shared.permutation(STEPS_SORTED)[turn])
        num = self._batch_size(place)
        if group != self._group:
            rng = np.random.default_rng((*self._seed, group, self._world.rank, SCENES_STREAM))
            clean, scenes = self._pools[place].draw(rng, num * STEPS_SORTED)
            texts = [self._write(scene, rng) for scene in scenes]
            order = np.argsort(self._captions.lengths(texts), kind="stable")
            self._group = group
            self._dealt = clean[order], [texts[i] for i in order]
        clean, texts = self._dealt
        chosen = slice(turn * num, (turn + 1) * num)
        return clean[chosen], texts[chosen]


def transformer_config(recipe: Recipe, in_channels: int, cap_feat_dim: int) -> NextDiTConfig:
    """The recipe's shape, with the widths that the other two parts dictate."""
    return NextDiTConfig.from_dict(
        {
            **recipe.transformer,
            "in_channels": in_channels,
            "cap_feat_dim": cap_feat_dim,
            "sample_size": recipe.default_width // 8,
        }
    )


def _by_timestep(losses: Tensor, timesteps: Tensor) -> dict[str, float]:
    """Mean loss of the noisy, middle and clean third; absent where no sample fell."""
    report = {}
    for third, name in enumerate(("loss_noisy", "loss_middle", "loss_clean")):
        chosen = losses[(timesteps * 3).long().clamp_max(2) == third]
        if len(chosen):
            report[name] = float(chosen.mean())
    return report
