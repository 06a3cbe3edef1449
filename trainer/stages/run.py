"""A whole training run: the recipe's stages in order, each skipped when it is already done.

Layout of a run folder: ``recipe.yaml``, then one folder per stage with its checkpoints, metrics,
previews, ``report.md`` and, once done, ``final/`` with what the next stage and the export need.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import yaml

from model.checkpoint import CheckpointError, write_json
from model.next_dit import NextDiT
from trainer.config import Recipe
from trainer.distributed import World, barrier
from trainer.previews import Previews, plain_network
from trainer.report import write_report
from trainer.stages.diffusion import DiffusionStage, transformer_config
from trainer.stages.flow import FlowStage
from trainer.stages.parts import FrozenParts, encoded_data
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
            transformer is where the first stage that trains one starts.

    Raises:
        ValueError: when ``out`` holds a run of another recipe, or parts are missing.
        CheckpointError: when ``init`` cannot be read.
    """
    vae_folder, text_folder = parts_of(recipe, out, init)
    if world.is_main:
        _claim(recipe, out)
    barrier(world)
    _train_parts(recipe, out, world, init)
    frozen = FrozenParts(vae_folder, text_folder, world)
    previous = init / "transformer" if init else None
    for index, name in enumerate(recipe.transformer_stages):
        folder = out / name
        if not (folder / FINAL).is_dir():
            stage = _transformer_stage(recipe, index, out, frozen, world, previous)
            previews = Previews(recipe, out, folder, frozen, stage.module.config, world)
            ema = train_stage(stage, folder, world, observe=previews)
            weights = ema.whole_weights()
            if world.is_main:
                _publish(folder, plain_network(stage.module.config, weights).save_pretrained)
                write_report(folder)
            barrier(world)
        previous = folder / FINAL


def parts_of(recipe: Recipe, out: Path, init: Path | None) -> tuple[Path, Path]:
    """Folders of the autoencoder, and of text encoder and tokenizer, for a run.

    Raises:
        ValueError: when the recipe neither trains nor names them.
    """
    given = init or (Path(recipe.parts) if recipe.parts else None)
    trained = recipe.vae is not None and recipe.text is not None
    if given is None and not trained:
        raise ValueError(
            f"recipe {recipe.name!r} trains no autoencoder and text encoder of its own: name a "
            "pipeline folder that has them with --set parts=DIR, or a checkpoint with --init DIR"
        )
    if given is not None:
        return given / "vae", given
    return out / CompactStage.name / FINAL, out / "text" / FINAL


def _transformer_stage(
    recipe: Recipe,
    index: int,
    out: Path,
    frozen: FrozenParts,
    world: World,
    previous: Path | None,
) -> DiffusionStage | FlowStage:
    """The stage with its first weights."""
    stage: DiffusionStage | FlowStage
    if index < len(recipe.diffusion):
        stage = DiffusionStage(recipe, index, frozen.vae, frozen.captions, out / "cache", world)
    else:
        config = recipe.flow[index - len(recipe.diffusion)]
        data = encoded_data(recipe, config, out, frozen, world)
        torch.manual_seed(recipe.seed)
        dit = NextDiT(
            transformer_config(recipe, frozen.vae.latent_channels, frozen.captions.feature_dim)
        )
        stage = FlowStage(config, dit, data, (recipe.seed, index), world)
    if previous is not None:
        _start_from(stage.module, previous)
    return stage


def _train_parts(recipe: Recipe, out: Path, world: World, init: Path | None) -> None:
    """The autoencoder, its compact second stage, and the text encoder, where none are given."""
    if init is not None or recipe.parts or recipe.vae is None or recipe.text is None:
        return
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
            write_report(folder)
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
    write_json(out / "generation_config.json", recipe.generation)
    (out / "revision.txt").write_text(git_revision() + "\n", encoding="utf-8")


def git_revision() -> str:
    """The commit of the source tree, or 'unknown' outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
