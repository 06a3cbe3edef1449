"""A whole training run: the recipe's stages in order, each skipped when it is already done.

Layout of a run folder: ``recipe.yaml``, then one folder per stage with its training state, metrics
and, once done, ``final/`` with what the next stage and the export need.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from model.checkpoint import CheckpointError
from model.next_dit import NextDiT
from model.vae import VAE
from trainer.config import Recipe
from trainer.data.captions import CaptionEncoder
from trainer.distributed import World, barrier
from trainer.stages.diffusion import DiffusionStage
from trainer.stages.text import TextStage
from trainer.stages.vae import CompactStage, VaeStage
from trainer.trainer import train_stage

FINAL = "final"


def run_recipe(recipe: Recipe, out: Path, world: World, init: Path | None = None) -> None:
    """Train every stage that is not finished yet.

    Args:
        recipe: what to do.
        out: the run folder.
        world: the processes taking part.
        init: a checkpoint folder; its autoencoder and text encoder are used as they are, and its
            transformer is where the first diffusion stage starts.

    Raises:
        ValueError: when ``out`` holds a run of another recipe.
        CheckpointError: when ``init`` cannot be read.
    """
    if world.is_main:
        _claim(recipe, out)
    barrier(world)
    parts = init if init is not None else out
    if init is None:
        _train_parts(recipe, out, world)
    vae = VAE.from_pretrained(init / "vae" if init else out / CompactStage.name / FINAL)
    captions = CaptionEncoder(parts if init else out / "text" / FINAL)
    previous = init / "transformer" if init else None
    for index, config in enumerate(recipe.diffusion):
        folder = out / config.name
        if not (folder / FINAL).is_dir():
            stage = DiffusionStage(recipe, index, vae, captions, out / "cache", world)
            if previous is not None:
                _start_from(stage.module, previous)
            ema = train_stage(stage, folder, world)
            if world.is_main:
                stage.module.load_state_dict(ema.weights())
                _publish(folder, stage.module.save_pretrained)
            barrier(world)
        previous = folder / FINAL


def _train_parts(recipe: Recipe, out: Path, world: World) -> None:
    """The autoencoder, its compact second stage, and the text encoder."""
    for name in (VaeStage.name, CompactStage.name, TextStage.name):
        folder = out / name
        if (folder / FINAL).is_dir():
            continue
        stage: VaeStage | TextStage
        if name == TextStage.name:
            stage = TextStage(recipe.text, recipe.seed, world)
        elif name == CompactStage.name:
            stage = CompactStage(recipe.vae, recipe.seed, world, out / VaeStage.name / FINAL)
        else:
            stage = VaeStage(recipe.vae, recipe.seed, world)
        ema = train_stage(stage, folder, world)
        if world.is_main:
            _publish(folder, partial(stage.finish, ema))
        barrier(world)


def _publish(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill ``folder/final``, whole or not at all: its presence means done."""
    temporary = folder / f"{FINAL}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    os.replace(temporary, folder / FINAL)


def _start_from(dit: NextDiT, folder: Path) -> None:
    """Load an earlier stage's weights."""
    loaded = NextDiT.from_pretrained(folder)
    for name in ("hidden_size", "num_layers", "num_refiner_layers", "in_channels", "cap_feat_dim"):
        ours, theirs = getattr(dit.config, name), getattr(loaded.config, name)
        if ours != theirs:
            raise CheckpointError(f"{folder.name}: {name} is {theirs}, the recipe asks for {ours}")
    dit.load_state_dict(loaded.state_dict())


def _claim(recipe: Recipe, out: Path) -> None:
    """Write the recipe and the code's revision into a new run; refuse another recipe's run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.yaml"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"--out {str(out)!r} holds a run of another recipe or other settings; choose a new "
            "folder, or remove it"
        )
    path.write_text(text, encoding="utf-8")
    (out / "revision.txt").write_text(git_revision() + "\n", encoding="utf-8")


def git_revision() -> str:
    """The commit of the source tree, or 'unknown' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
