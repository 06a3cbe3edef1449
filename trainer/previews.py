"""Pictures of fixed prompts while a transformer learns, drawn with its averaged weights."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.config import NextDiTConfig
from model.generation_config import load_generation_config
from model.next_dit import NextDiT
from model.pipeline import Pipeline
from model.request import GenerationRequest
from model.text_encoder import TextEncoder
from trainer.config import Recipe
from trainer.distributed import World
from trainer.ema import Ema
from trainer.metrics import Metrics
from trainer.report import write_report
from trainer.stages.parts import FrozenParts

FOLDER = "previews"
SEED = 1
COLUMNS = 4


class Previews:
    """Draws the recipe's prompts every so many steps; called after each step by all processes."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        stage: Path,
        frozen: FrozenParts,
        config: NextDiTConfig,
        world: World,
    ) -> None:
        self._recipe, self._run, self._folder = recipe, run, stage / FOLDER
        self._frozen, self._config, self._world = frozen, config, world

    def __call__(self, step: int, ema: Ema, metrics: Metrics) -> None:
        """Draw after ``step`` if its turn has come."""
        every = self._recipe.previews.every
        if not every or step % every or not self._recipe.previews.prompts:
            return
        weights = ema.whole_weights()  # of all processes together
        if self._world.is_main:
            image = grid(self._draw(weights))
            self._folder.mkdir(parents=True, exist_ok=True)
            image.save(self._folder / f"step-{step:08d}.png")
            metrics.picture(step, "previews", np.asarray(image))
            write_report(self._folder.parent)

    def _draw(self, weights: dict[str, Tensor]) -> list[Image.Image]:
        previews = self._recipe.previews
        device = self._world.device
        dit = plain_network(self._config, weights).to(device).eval()
        downscale = self._frozen.vae.downscale
        pipeline = Pipeline(
            dit=dit,
            vae=self._frozen.vae,
            text_encoder=TextEncoder.from_pretrained(self._frozen.text_folder, device=device),
            generation_config=load_generation_config(
                self._run,
                shift=self._recipe.shift,
                trained_size=self._config.sample_size * downscale,
                size_multiple=downscale * self._config.patch_size,
            ),
        )
        requests = [
            GenerationRequest(
                prompt,
                seed=SEED,
                num_inference_steps=previews.num_inference_steps,
                guidance_scale=previews.guidance_scale,
            )
            for prompt in previews.prompts
        ]
        # One by one: a preview must not need more memory than the step it interrupts.
        return [pipeline.generate([request])[0][0] for request in requests]


def plain_network(config: NextDiTConfig, weights: dict[str, Tensor]) -> NextDiT:
    """A network that is neither sharded nor recomputed, with these weights."""
    with torch.device("meta"):
        dit = NextDiT(config)
    dit.load_state_dict(weights, assign=True)
    return dit


def grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of equal size in rows of up to COLUMNS."""
    width, height = images[0].size
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    return sheet
